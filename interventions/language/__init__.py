"""Safety methods for language models, each a plan made of the edit vocabulary."""

from headscope.interventions.language.ablation import ablate_heads
from headscope.interventions.language.directions import Direction, choose_direction, find_directions
from headscope.interventions.language.emphasis import choose_heads, edit_sink, emphasise, profile_heads
from headscope.interventions.language.freezing import split_effect
from headscope.interventions.language.head_search import HeadSet, search_heads
from headscope.interventions.language.head_sets import Removal
from headscope.interventions.language.inference_time import fit_truth_heads
from headscope.interventions.language.knockout import Flow, knock_out, sweep_windows
from headscope.interventions.language.path_patching import Receiver, patch_paths, rank_paths
from headscope.interventions.language.safety_heads import score_sahara, score_ships
from headscope.interventions.language.spectral import fit_spectral

__all__ = [
    "Direction",
    "Flow",
    "HeadSet",
    "Receiver",
    "Removal",
    "ablate_heads",
    "choose_direction",
    "choose_heads",
    "edit_sink",
    "emphasise",
    "find_directions",
    "fit_spectral",
    "fit_truth_heads",
    "knock_out",
    "patch_paths",
    "profile_heads",
    "rank_paths",
    "score_sahara",
    "score_ships",
    "search_heads",
    "split_effect",
    "sweep_windows",
]
