"""How healthy the attention of a model is: budgets, ranks, sinks, and what to try where something is wrong."""
