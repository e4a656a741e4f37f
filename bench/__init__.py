"""What Headscope costs, measured next to other tools. `python -m bench` runs everything; results lie in bench/results."""
