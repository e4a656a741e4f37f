"""Wrong formulas that the tests must notice: slips that are easy to make in these kernels, each in one place of one file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutant:
    """One wrong formula.

    Attributes:
        name: unique, for --only.
        file: which file of kernels/ it is in.
        old: text that stands in the file exactly once.
        new: what stands there instead.
        why: what is wrong about it.
        tests: arguments of pytest, the smallest choice of tests that should fail.
    """

    name: str
    file: str
    old: str
    new: str
    why: str
    tests: tuple[str, ...]

    @property
    def implementation(self) -> str:
        """The folder or file of kernels/ it is in: reference, blockwise, cpu, triton, …"""
        return Path(self.file).parts[0].removesuffix(".py")

    def misfit(self, kernels: Path) -> str | None:
        """Why it cannot be put into these kernels; None if it can."""
        path = kernels / self.file
        if not path.exists():
            return f"there is no kernels/{self.file}"
        count = path.read_text(encoding="utf-8").count(self.old)
        return None if count == 1 and self.old != self.new else f"its text stands {count} times in kernels/{self.file}"

    def apply(self, kernels: Path) -> None:
        """Change the file in a copy of kernels/."""
        path = kernels / self.file
        path.write_text(path.read_text(encoding="utf-8").replace(self.old, self.new), encoding="utf-8")


AGREEMENT = "tests/kernels/test_agreement.py"
REFERENCE = (AGREEMENT, "-k", "reference")
CPU = (AGREEMENT, "-k", "cpu")
IDENTITIES = ("tests/kernels/test_identities.py",)
RELEVANCE = ("tests/kernels/test_relevance.py", AGREEMENT, "-k", "published or autograd or relevance_of_many")
TRITON = (AGREEMENT, "-k", "triton and (any_call or alike or sink or entropy or tiles)")
TRITON_RELEVANCE = ("tests/kernels/test_relevance.py", "-k", "triton_gives_the_same or (any_call and triton)")
BLOCKWISE = (AGREEMENT, "-k", "blockwise")

MUTANTS = (
    # What all implementations read.
    Mutant(
        "problem: causal hides the diagonal",
        "problem.py",
        "last = (place + (1 if causal or window is None else window)).clamp(0, own_keys)",
        "last = (place + (0 if causal or window is None else window)).clamp(0, own_keys)",
        "a query must see the key at its own place",
        REFERENCE,
    ),
    Mutant(
        "problem: causality from the top left",
        "problem.py",
        "(own_keys - own_queries if offset is None else offset)",
        "(0 if offset is None else offset)",
        "the last query stands at the last key",
        REFERENCE,
    ),
    Mutant(
        "problem: window one key too long",
        "problem.py",
        "place - window + 1).clamp",
        "place - window).clamp",
        "a window of 1 is the query's own key alone",
        REFERENCE,
    ),
    Mutant(
        "problem: temperature multiplies",
        "problem.py",
        "return self.scale / self.temperature.to(dtype)",
        "return self.scale * self.temperature.to(dtype)",
        "a higher temperature flattens",
        REFERENCE,
    ),
    Mutant(
        "problem: packed keys start at the queries' place",
        "problem.py",
        "before = accumulate(key_lengths, initial=0)",
        "before = accumulate(lengths, initial=0)",
        "keys are packed by their own lengths",
        REFERENCE,
    ),
    # The reference, against the twin.
    Mutant(
        "reference: heads share round robin",
        "reference.py",
        "x.repeat_interleave(heads // x.shape[1], dim=1)",
        "x.repeat(1, heads // x.shape[1], 1, 1)",
        "head h uses h // (H / G), not h % G",
        REFERENCE,
    ),
    Mutant(
        "reference: softcap after the bias",
        "reference.py",
        """    if problem.softcap is not None:
        seen = problem.softcap * torch.tanh(seen / problem.softcap)
    if problem.bias is not None:
        seen = seen + problem.bias.double()
""",
        """    if problem.bias is not None:
        seen = seen + problem.bias.double()
    if problem.softcap is not None:
        seen = problem.softcap * torch.tanh(seen / problem.softcap)
""",
        "a bias of -inf would be capped, and others bent",
        REFERENCE,
    ),
    Mutant(
        "reference: lse counts the sink",
        "reference.py",
        'found["lse"] = torch.logsumexp(seen.masked_fill(dead[..., None], 0.0), dim=-1).masked_fill(dead, float("-inf"))',
        """found["lse"] = torch.logsumexp(seen.masked_fill(dead[..., None], 0.0), dim=-1).masked_fill(dead, float("-inf"))
    if problem.sink is not None:
        found["lse"] = torch.logaddexp(found["lse"], problem.sink.double()[:, None])""",
        "lse is that of the real keys",
        REFERENCE,
    ),
    Mutant(
        "reference: p_max does not count the sink",
        "reference.py",
        'found["p_max"] = weights.amax(dim=-1)',
        'found["p_max"] = alone.amax(dim=-1)',
        "p_max is what the model multiplies a value by",
        REFERENCE,
    ),
    Mutant(
        "reference: mean of a tile",
        "reference.py",
        "tile, columns, tile).sum(dim=(3, 5))",
        "tile, columns, tile).mean(dim=(3, 5))",
        "pooled is mass",
        REFERENCE,
    ),
    Mutant(
        "reference: gate on the pattern",
        "reference.py",
        """    found: dict[str, Tensor] = {}
    if keys:
""",
        """    found: dict[str, Tensor] = {}
    weights = weights if problem.gate is None else weights * problem.gate.double()[:, None, None]
    if keys:
""",
        "a gate multiplies the output alone, once",
        REFERENCE,
    ),
    # The compiled CPU path.
    Mutant(
        "cpu: mask inverted",
        "cpu/attention.c",
        "x[j] = mask[j] ? x[j] : -INFINITY;",
        "x[j] = mask[j] ? -INFINITY : x[j];",
        "True means may be seen",
        CPU,
    ),
    Mutant(
        "cpu: highest of equal keys across blocks",
        "cpu/attention.c",
        "if (own > top) {",
        "if (own >= top && own > -INFINITY) {",
        "on a tie the lowest key is named",
        CPU,
    ),
    Mutant(
        "cpu: entropy by the unshifted sum",
        "cpu/attention.c",
        "entropy = log_sum - sums.shifted / sums.sum;",
        "entropy = lse - (sums.shifted / sums.sum + top);",
        "lse and the sum of p·s agree in their first digits, which the difference loses",
        CPU,
    ),
    Mutant(
        "cpu: sum of squares divided once",
        "cpu/attention.c",
        "squares = sums.squares / (sums.sum * sums.sum);",
        "squares = sums.squares / sums.sum;",
        "Σp² needs 1 / l²",
        CPU,
    ),
    Mutant(
        "cpu: sink left out of the weight",
        "cpu/attention.c",
        "weight = sink == INFINITY ? NAN : 1 / (sums.sum + (c->sink ? expf(sink - top) : 0));",
        "weight = 1 / sums.sum;",
        "the sink takes its share",
        CPU,
    ),
    Mutant(
        "cpu: received without the weight",
        "cpu/attention.c",
        "sum[i] += own * at[i];",
        "sum[i] += at[i];",
        "exponentials are not probabilities",
        CPU,
    ),
    Mutant(
        "cpu: key bias from the first key",
        "cpu/attention.c",
        "head * c->key_bias_head + key * c->key_bias_key",
        "head * c->key_bias_head",
        "a row begins at its first visible key, not at key 0",
        CPU,
    ),
    Mutant(
        "cpu: bias from the first key",
        "cpu/attention.c",
        "query * c->bias_row + key * c->bias_key;",
        "query * c->bias_row;",
        "a row begins at its first visible key, not at key 0",
        CPU,
    ),
    Mutant(
        "cpu: moments not normalised",
        "cpu/attention.c",
        "store(c, out, weights + h * count, 1, c->group",
        "store(c, out, (const float[256]){[0 ... 255] = 1}, 1, c->group",
        "features are averaged by the pattern",
        CPU,
    ),
    Mutant(
        "cpu: heads share round robin",
        "cpu/run.py",
        "part = _dense_rows(tensor[b, g].detach().float())",
        "part = _dense_rows(tensor[b, g - 1].detach().float())",
        "key head g belongs to the query heads from g·H/G on",
        CPU,
    ),
    Mutant(
        "cpu: tile of the panel",
        "cpu/attention.c",
        "c->pooled ? c->tile - (query + i) % c->tile : count",
        "c->pooled ? c->tile - i % c->tile : count",
        "tiles count from the first query, not from the panel's",
        CPU,
    ),
    Mutant(
        "cpu: argmax counted from the panel's first key",
        "cpu/attention.c",
        "argmax = key + aligned + where;",
        "argmax = aligned + where;",
        "argmax counts from key 0",
        CPU,
    ),
    # By panels, in plain torch.
    Mutant(
        "blockwise: hidden keys in front of the panel",
        "blockwise.py",
        "masked_fill_(key < problem.first[panel.rows, None], -torch.inf)",
        "masked_fill_(key <= problem.first[panel.rows, None], -torch.inf)",
        "first is the first visible key",
        BLOCKWISE,
    ),
    Mutant(
        "blockwise: one key past the diagonal",
        "blockwise.py",
        "masked_fill_(key >= problem.stop[panel.rows, None], -torch.inf)",
        "masked_fill_(key > problem.stop[panel.rows, None], -torch.inf)",
        "stop is the first key that is hidden",
        BLOCKWISE,
    ),
    Mutant(
        "blockwise: all of a panel is common to its queries",
        "blockwise.py",
        "slice(min(max(first[rows]), end) - begin,",
        "slice(min(min(first[rows]), end) - begin,",
        "the last query of a panel sees least on the left",
        BLOCKWISE,
    ),
    Mutant(
        "blockwise: NaN for dead rows",
        "blockwise.py",
        "shift = top.masked_fill(dead, 0.0)",
        "shift = top.masked_fill(dead, -torch.inf)",
        "-inf less -inf is NaN",
        BLOCKWISE,
    ),
    Mutant(
        "blockwise: entropy by the unshifted sum",
        "blockwise.py",
        'found["entropy"] = log_total - torch.mul(p, shifted, out=self._over(shifted)).sum(dim=-1) / total',
        'found["entropy"] = (shift + log_total) - (torch.mul(p, shifted, out=self._over(shifted)).sum(dim=-1) / total + shift)',
        "lse and Σ p·s agree in their first digits, which the difference loses",
        BLOCKWISE,
    ),
    Mutant(
        "blockwise: entropy counts the sink",
        "blockwise.py",
        """            log_total = torch.logaddexp(log_total, self.sink - shift)
""",
        """            if "entropy" in names:
                found["entropy"] += torch.logaddexp(log_total, self.sink - shift) - log_total
            log_total = torch.logaddexp(log_total, self.sink - shift)
""",
        "entropy is that of the real keys",
        BLOCKWISE,
    ),
    Mutant(
        "blockwise: sink not shifted",
        "blockwise.py",
        "torch.logaddexp(log_total, self.sink - shift)",
        "torch.logaddexp(log_total, self.sink)",
        "the sum is in the frame of the largest score",
        BLOCKWISE,
    ),
    Mutant(
        "blockwise: sum of squares divided once",
        "blockwise.py",
        ".sum(dim=-1) / total.square()",
        ".sum(dim=-1) / total",
        "Σp² needs 1 / l²",
        BLOCKWISE,
    ),
    Mutant(
        "blockwise: received without the weight",
        "blockwise.py",
        "column_sums(p, weight, wanted.tile)",
        "column_sums(p, None, wanted.tile)",
        "exponentials are not probabilities",
        BLOCKWISE,
    ),
    Mutant(
        "blockwise: argmax counted from the panel's first key",
        "blockwise.py",
        "(place + keys.start)",
        "place",
        "argmax counts from key 0",
        BLOCKWISE,
    ),
    Mutant(
        "blockwise: last of equal keys",
        "blockwise.py",
        "scores.gather(-1, places).argmax(dim=-1)",
        "(_RUN - 1 - scores.gather(-1, places).flip(-1).argmax(dim=-1))",
        "on a tie the lowest key is named",
        BLOCKWISE,
    ),
    Mutant(
        "blockwise: torch's own top keys",
        "blockwise.py",
        "return places.gather(-1, seen.gather(-1, places).argsort(dim=-1, descending=True, stable=True))",
        "return seen.topk(count).indices",
        "which of equal keys topk names is not said",
        BLOCKWISE,
    ),
    Mutant(
        "blockwise: temperature on the softcapped score too",
        "blockwise.py",
        "seen = torch.mul(seen, problem.softcap, out=self._over(seen))",
        "seen = torch.mul(seen, problem.softcap * (self.factor / problem.scale if problem.scale else 1), out=self._over(seen))",
        "temperature acts once, before the cap",
        BLOCKWISE,
    ),
    Mutant(
        "blockwise: heads share round robin",
        "blockwise.py",
        "together = q.reshape(len(k), -1, q.shape[3])",
        "together = q.unflatten(1, (problem.shared, -1)).transpose(1, 2).reshape(len(k), -1, q.shape[3])",
        "head h uses h // (H / G), not h % G",
        BLOCKWISE,
    ),
    Mutant(
        "blockwise: rows of a panel begin at key 0",
        "blockwise.py",
        "return torch.cat([before, p * weight[..., None], after], dim=-1)",
        "return torch.cat([p * weight[..., None], before, after], dim=-1)",
        "a panel begins at the first key that it sees",
        BLOCKWISE,
    ),
    Mutant(
        "blockwise: gate on the statistics",
        "blockwise.py",
        "weight = (-log_total).exp().masked_fill(dead, 0.0)",
        "weight = (-log_total).exp().masked_fill(dead, 0.0) * (1 if self.gate is None else self.gate[..., 0])",
        "a gate multiplies the output alone, once",
        BLOCKWISE,
    ),
    Mutant(
        "blockwise: NaN rows leave received alone",
        "blockwise.py",
        """masked_fill(broken.any(dim=-1, keepdim=True), torch.nan)""",
        """masked_fill(broken.any(dim=-1, keepdim=True), 0.0)""",
        "what a row of NaN gives is not known",
        BLOCKWISE,
    ),
    # From the gradient of the output to those of the inputs.
    Mutant(
        "backward: all relevance to both factors",
        "backward.py",
        "return 0.5 if self.splits else 1.0",
        "return 1.0",
        "the two factors of a product share what arrives",
        RELEVANCE,
    ),
    Mutant(
        "backward: delta left out",
        "backward.py",
        "pattern * of_cells.sub_(rows[sample, some, mine, None])",
        "pattern * of_cells",
        "a softmax takes away the row's mean",
        RELEVANCE,
    ),
    Mutant(
        "backward: slope of the softcap under the relevance rule",
        "backward.py",
        """            if rule.splits:
                slope = torch.where""",
        """            if not rule.splits:
                slope = torch.where""",
        "a function of one input passes relevance on whole",
        RELEVANCE,
    ),
    Mutant(
        "backward: keys get the last of their query heads",
        "backward.py",
        """        to_k[sample, groups, seen] += weights.mT @ own_q
""",
        """        to_k[sample, groups, seen] = weights.mT @ own_q
""",
        "what the panels give is summed",
        RELEVANCE,
    ),
    Mutant(
        "backward: sink left out of the pattern",
        "backward.py",
        "full = torch.logaddexp(full, problem.sink.to(full.dtype)[:, None])",
        "full = full + 0 * problem.sink.to(full.dtype)[:, None]",
        "lse is without the sink, the pattern with it",
        RELEVANCE,
    ),
    Mutant(
        "backward: epsilon twice as large",
        "backward.py",
        """size = x.abs()
    return size / (size + epsilon / 2)""",
        """size = x.abs()
    return size / (size + epsilon)""",
        "R / (2 z + ε) is R / 2 / (z + ε/2)",
        RELEVANCE,
    ),
    Mutant(
        "backward: dead rows count",
        "backward.py",
        "return full.masked_fill(dead, torch.inf)",
        "return full",
        "-inf less -inf is NaN",
        RELEVANCE,
    ),
    Mutant(
        "triton backward: part left out for the keys",
        "triton/backward.py",
        "g_k *= scale * part / heat",
        "g_k *= scale / heat",
        "each factor of q·k gets a half",
        TRITON_RELEVANCE,
    ),
    Mutant(
        "triton backward: delta left out",
        "triton/backward.py",
        "weights = pattern * (of_cells - row_delta)",
        "weights = pattern * of_cells",
        "a softmax takes away the row's mean",
        TRITON_RELEVANCE,
    ),
    Mutant(
        "triton backward: keys of another group",
        "triton/backward.py",
        """group = head // SHARED
""",
        """group = head % (HEADS // SHARED)
""",
        "head h uses h // (H / G), not h % G",
        TRITON_RELEVANCE,
    ),
    Mutant(
        "triton backward: one head for all that share",
        "triton/backward.py",
        "head = group * SHARED + member",
        "head = group * SHARED",
        "what the heads that share a key head give is summed",
        TRITON_RELEVANCE,
    ),
    Mutant(
        "triton backward: slope of the softcap under the relevance rule",
        "triton/backward.py",
        """        if SPLITS:
            weights *= share""",
        """        if not SPLITS:
            weights *= share""",
        "a function of one input passes relevance on whole",
        TRITON_RELEVANCE,
    ),
    Mutant(
        "triton backward: pattern in nats",
        "triton/backward.py",
        "bits = pattern_lse(problem, lse) * math.log2(math.e)",
        "bits = pattern_lse(problem, lse)",
        "exp2 needs lse in bits",
        TRITON_RELEVANCE,
    ),
    Mutant(
        "triton backward: tiles on the diagonal are whole",
        "triton/backward.py",
        "end = middle + tl.maximum(full_stop - middle, 0) // N * N",
        "end = middle + tl.cdiv(tl.maximum(full_stop - middle, 0), N) * N",
        "a tile that is cut needs the test of visibility",
        TRITON_RELEVANCE,
    ),
    # In one pass, in Triton.
    Mutant(
        "triton: accumulators not rescaled",
        "triton/forward.py",
        "values = add_product(p, v_tile, values * a[:, None], INTERPRETED)",
        "values = add_product(p, v_tile, values, INTERPRETED)",
        "a new largest score changes the frame",
        TRITON,
    ),
    Mutant(
        "triton: sum of squares rescaled once",
        "triton/forward.py",
        "squares = a * a * squares + tl.sum(p * p, 1)",
        "squares = a * squares + tl.sum(p * p, 1)",
        "squares scale by the square",
        TRITON,
    ),
    Mutant(
        "triton: entropy's sum not moved to the new frame",
        "triton/forward.py",
        "shifted = a * (shifted + d * total) + tl.sum(p * t, 1)",
        "shifted = a * shifted + tl.sum(p * t, 1)",
        "with the frame every t changes by d",
        TRITON,
    ),
    Mutant(
        "triton: ln 2 left out of lse",
        "triton/forward.py",
        "(m + tl.log2(share)) * 0.6931471805599453",
        "(m + tl.log2(share))",
        "scores are in bits, lse is in nats",
        TRITON,
    ),
    Mutant(
        "triton: last of equal keys",
        "triton/forward.py",
        "((block_max == x_max) & (nearest < best))",
        "((block_max == x_max) & (nearest > best))",
        "on a tie the lowest key is named",
        TRITON,
    ),
    Mutant(
        "triton: last of equal keys of a block",
        "triton/forward.py",
        "tl.min(tl.where(x == block_max[:, None], key[None, :], KEYS), 1)",
        "tl.max(tl.where(x == block_max[:, None], key[None, :], -1), 1)",
        "on a tie the lowest key is named",
        TRITON,
    ),
    Mutant(
        "triton: heads share round robin",
        "triton/forward.py",
        "group = head // shared",
        "group = head % (heads // shared)",
        "head h uses h // (H / G), not h % G",
        TRITON,
    ),
    Mutant(
        "triton: blocks on the diagonal are whole",
        "triton/forward.py",
        "inner_high = tl.min(tl.where(there, end, n_keys)) // KEYS * KEYS",
        "inner_high = tl.cdiv(tl.min(tl.where(there, end, n_keys)), KEYS) * KEYS",
        "a block that is cut needs the test of visibility",
        TRITON,
    ),
    Mutant(
        "triton: sink in lse",
        "triton/forward.py",
        'tl.where(dead, float("-inf"), (m + tl.log2(share)) *',
        'tl.where(dead, float("-inf"), (m + tl.log2(everything)) *',
        "lse is that of the real keys",
        TRITON,
    ),
    Mutant(
        "triton: sink in nats",
        "triton/forward.py",
        "tl.load(sink + head).to(tl.float32) * 1.4426950408889634",
        "tl.load(sink + head).to(tl.float32)",
        "the frame is in bits",
        TRITON,
    ),
    Mutant(
        "triton: moments over the real keys alone",
        "triton/forward.py",
        "share * weight / tl.where(dead, 1.0, ones)",
        "1.0 / tl.where(dead, 1.0, ones)",
        "a sink's share carries no features",
        TRITON,
    ),
    Mutant(
        "triton: NaN where no key was seen yet",
        "triton/forward.py",
        'new_m = tl.where(new_max == float("-inf"), 0.0, new_m)',
        "new_m = new_m",
        "-inf less -inf is NaN",
        TRITON,
    ),
    Mutant(
        "triton: diagonal hidden",
        "triton/common.py",
        "(key_start + key < stop), x",
        "(key_start + key < stop - 1), x",
        "stop is the first key that is hidden",
        TRITON,
    ),
    Mutant(
        "triton: mask inverted",
        "triton/common.py",
        "tl.where(allowed != 0, x,",
        "tl.where(allowed == 0, x,",
        "True means may be seen",
        TRITON,
    ),
    Mutant(
        "triton: softcap of half the score",
        "triton/common.py",
        "x = softcap - 2.0 * softcap / (tl.exp2(x * factor) + 1.0)",
        "x = softcap - 2.0 * softcap / (tl.exp2(x * factor * 0.5) + 1.0)",
        "tanh x = 1 - 2 / (exp 2x + 1)",
        TRITON,
    ),
    # By keys, in Triton.
    Mutant(
        "triton columns: rows not weighed",
        "triton/columns.py",
        """p = tl.exp2(x * unit - highest[None, :]) * weight[None, :]
""",
        """p = tl.exp2(x * unit - highest[None, :])
""",
        "exponentials are not probabilities",
        TRITON,
    ),
    Mutant(
        "triton columns: mean of a row of tiles",
        "triton/columns.py",
        "mass += tl.sum(tl.reshape(part, [KEYS // CELL, CELL]), 1)[:, None]",
        "mass += tl.sum(tl.reshape(part, [KEYS // CELL, CELL]), 1)[:, None] / ROWS",
        "pooled is mass",
        TRITON,
    ),
    Mutant(
        "triton columns: tiles not begun anew",
        "triton/columns.py",
        "mass = tl.where(complete, 0.0, mass)",
        "mass = mass",
        "each row of tiles has a sum of its own",
        TRITON,
    ),
    Mutant(
        "triton columns: stops at the first key's last query",
        "triton/columns.py",
        "highest = tl.cdiv(tl.max(end), STEP) * STEP",
        "highest = tl.cdiv(tl.min(tl.where(there, end, n_queries)), STEP) * STEP",
        "later keys are seen by later queries under a window",
        TRITON,
    ),
    Mutant(
        "triton columns: heads share round robin",
        "triton/columns.py",
        """    group = head // shared
    key_start =""",
        """    group = head % (heads // shared)
    key_start =""",
        "head h uses h // (H / G), not h % G",
        TRITON,
    ),
    Mutant(
        "triton columns: odd tiles one line off",
        "triton/columns.py",
        "own = tl.minimum(step // tile, together - 1)",
        "own = tl.minimum((step + 1) // tile, together - 1)",
        "a line belongs to the tile it lies in",
        TRITON,
    ),
    Mutant(
        "triton rows: not weighed",
        "triton/rows.py",
        "p = tl.exp2(x * unit - highest[:, None]) * weight[:, None]",
        "p = tl.exp2(x * unit - highest[:, None])",
        "exponentials are not probabilities",
        TRITON,
    ),
    Mutant(
        "triton top: highest of equal keys",
        "triton/top.py",
        "(0x7FFFFFFF - start - key)",
        "(start + key)",
        "on a tie the lowest key comes first",
        TRITON,
    ),
    Mutant(
        "triton top: bits of negative scores as they are",
        "triton/top.py",
        "return bits ^ ((bits >> 31) & 0x7FFFFFFF)",
        "return bits",
        "bits of negative numbers fall where the numbers grow",
        TRITON,
    ),
    Mutant(
        "triton top: one new key of each block",
        "triton/top.py",
        "while tl.max((largest > smallest).to(tl.int32), 0) > 0:",
        "for _ in tl.range(0, 1):",
        "a block may hold several of the largest",
        TRITON,
    ),
    # From any kernel's lse.
    Mutant(
        "identities: sum of squares at the same scale",
        "identities.py",
        "return (log_sums(kernel, plain, 2.0) - 2 * lse).exp()",
        "return (log_sums(kernel, plain, 1.0) - 2 * lse).exp()",
        "Σp² is lse at twice the scores",
        IDENTITIES,
    ),
    Mutant(
        "identities: Rényi with the other sign",
        "identities.py",
        "(1 - order)).masked_fill",
        "(order - 1)).masked_fill",
        "log Σp^α is negative where α > 1",
        IDENTITIES,
    ),
    Mutant(
        "identities: received without lse",
        "plain.py",
        "(-lse).masked_fill(~alive, -torch.inf)",
        "(0 * lse).masked_fill(~alive, -torch.inf)",
        "each row has a sum of its own",
        IDENTITIES,
    ),
    Mutant(
        "identities: causality not turned with the roles",
        "plain.py",
        "asked, answering, values = asked[:, :, before:].flip(2), answering.flip(2), values.flip(2)",
        "asked, answering, values = asked[:, :, before:], answering, values",
        "a key is seen by the queries after it",
        IDENTITIES,
    ),
    Mutant(
        "identities: offset counted from the first key",
        "identities.py",
        "columns = rows + (keys - queries - offset)",
        "columns = rows - offset",
        "query i stands at key i + K - Q",
        IDENTITIES,
    ),
    Mutant(
        "identities: parts of a causal call not weighed",
        "plain.py",
        "return inside * (lse_inside - lse).exp()[..., None] + outside * (lse_outside - lse).exp()[..., None], lse",
        "return (inside + outside) / 2, lse",
        "each part counts by its share of the sum",
        IDENTITIES,
    ),
)
