"""What each rule says when it finds something, what may be tried then, and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """What is said whenever a rule fires. `{…}` in `why` stands for numbers of the case."""

    head: str
    layer: str
    remedies: tuple[str, ...]
    source: str


RULES: dict[str, Rule] = {
    "token-collapse": Rule(
        "", "the tokens have become nearly one and the same vector: only {residual:.2g} of their norm still tells them apart "
        "(it was {before:.2g} where they entered), so no later layer can attend to one rather than another",
        ("check that the skip connections around attention and MLP are in place and not scaled away",
         "scale the residual branches by 1/√L, or start them near zero (ReZero, LayerScale)",
         "pre-norm in place of post-norm", "AttnScale, which lifts what distinguishes the tokens", "fewer layers"),
        "Dong et al. 2021; Noci et al. 2022; Wang et al. 2022",
    ),
    "alike-tokens": Rule(
        "", "the tokens point the same way (mean cosine {cosine:.2f}), which is common where a few dimensions are much larger "
        "than the rest: {centred}",
        ("read the centred numbers before acting", "look at the largest dimensions, and at the sink token"),
        "Ethayarajh 2019; Sun et al. 2024",
    ),
    "rank-collapse": Rule(
        "", "what distinguishes the tokens has shrunk to {rank:.1f} effective directions of {limit:.0f} possible: the tokens are "
        "on the way to becoming one",
        ("check that the skip connections around attention and MLP are in place", "scale the residual branches by 1/√L", "AttnScale",
         "measure on another text too: a repeated one has few directions by itself"),
        "Roy & Vetterli 2007; Dong et al. 2021",
    ),
    "uniform-attention": Rule(
        "attends to every visible token alike: its output is a mean of the values, whatever the query asks",
        "{count} of {total} heads attend to every visible token alike: their output is a mean of the values, whatever the query asks",
        ("check the scale of the scores (1/√D applied twice?) and the norm of the query and key weights",
         "a learned temperature, or QK-norm with a learned scale", "more training or a higher learning rate for W_Q and W_K",
         "take the head out, if the model is trained"),
        "Dong et al. 2021; Giorlandino & Goldt 2025",
    ),
    "pattern-rank-collapse": Rule(
        "", "every query of every head looks at the same keys: the patterns have rank one, routing is no more than uniform attention has, "
        "so the layer adds one and the same vector to all tokens",
        ("AttnScale, which amplifies what differs between the rows", "Sinkhorn attention, without a causal mask",
         "check the scale of the scores, and that W_Q and W_K are trained"),
        "Dong et al. 2021; Wang et al. 2022",
    ),
    "entropy-collapse": Rule(
        "", "{count} of {total} heads put nearly all attention on single keys, more than sinks and neighbours explain: "
        "the softmax is saturated, so queries and keys get next to no gradient",
        ("σReparam on the query and key weights", "QK-norm, or QUEST (normalised keys)", "a higher softmax temperature, or a smaller scale",
         "a lower learning rate or longer warm-up"),
        "Zhai et al. 2023",
    ),
    "logit-growth": Rule(
        "has attention scores up to {score:.4g}: the softmax saturates, and half precision loses what lies below",
        "{count} of {total} heads have attention scores up to {score:.4g}: the softmax saturates, and half precision loses "
        "what lies below",
        ("QK-norm, or QUEST (normalised keys)", "QK-Clip", "σReparam", "a soft cap on the scores", "weight decay on W_Q and W_K"),
        "Wortsman et al. 2023; Kimi Team 2025",
    ),
    "sink": Rule(
        "gives {sink:.2f} of its attention to the token at position {key:.0f}: the usual way for a head to do nothing",
        "{count} of {total} heads give {sink:.2f} of their attention and more to one token, mostly that at position {key:.0f}; "
        "it is the usual way for a head to do nothing, and normal in causal models",
        (), "Xiao et al. 2024; Gu et al. 2025",
    ),
    "sink-dominated": Rule(
        "", "all {total} heads give at least {sink:.2f} of their attention to one token: the layer moves next to nothing between tokens",
        ("take the attention of this layer out and see whether the loss minds", "sink or register tokens, so that no text token must serve",
         "a learned sink logit or gated attention, so that a head can do nothing without one"),
        "Xiao et al. 2024; Gu et al. 2025; Darcet et al. 2024",
    ),
    "gradient-vanishing": Rule(
        "gets {ratio:.2g} of the values' gradient at its queries and keys: where it looks hardly learns any more",
        "{count} of {total} heads get at most {ratio:.2g} of the values' gradient at their queries and keys: where they look hardly "
        "learns any more", ("residual scale 1/√L", "look for token-collapse in an earlier layer, the usual cause",
                            "separate learning rates for queries and keys"),
        "Noci et al. 2022",
    ),
    "amplifying": Rule(
        "can make tokens more different than they were (‖ΠP‖ at least {low:.2f}); softmax attention mostly makes them more alike",
        "{count} of {total} heads can make tokens more different than they were (‖ΠP‖ at least {low:.2f}); softmax attention mostly makes "
        "them more alike", (), "Dong et al. 2021",
    ),
    "doubly-stochastic": Rule(
        "is nearly doubly stochastic: every token receives about as much attention as it gives",
        "{count} of {total} heads are nearly doubly stochastic: every token receives about as much attention as it gives",
        (), "Sander et al. 2022",
    ),
    "untrained": Rule(
        "", "every head lies within {gap:.2g} of a freshly initialised network: the attention of this model looks untrained, and findings "
        "of uniform attention are what is to be expected of it", ("load trained weights", "train it"), "",
    ),
    "alike-inputs": Rule(
        "", "the tokens that go into the first block are nearly alike already (residual {residual:.2g}): whatever is found behind it says "
        "more about this input than about the model", ("measure on a text with different tokens",), "",
    ),
    "undefined-inputs": Rule(
        "", "it cannot be told how the tokens that go into the first block differ ({reason}), so nothing is said of what becomes of them",
        ("measure on a real input",), "",
    ),
}  # fmt: skip
