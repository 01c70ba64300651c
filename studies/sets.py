# SPDX-License-Identifier: Apache-2.0
r"""Do scores of sets, and prompts put where they help, condense better at 10 %?

python -m studies.sets --config=configs/folder.py:DIR --workdir=out/sets

- Elimination: removing prompt j adds `d_j` to a picture's logits, measured by a forward
  pass without it; removing a set adds about the sum of its `d_j`. The cheapest prompt
  goes, then the cheapest beside it. When half are gone the rest is measured again.
- Agreement: four estimates of what a set costs against its exact removal.
- Doubled: every prompt twice, of which half must go.
- Growth: while the kept ones are tuned, the least useful third is replaced by the
  candidates of which the loss has the steepest slope at a gate of 0.
- Relocation, in the manner of PRO-VPT (arXiv 2503.06901): what the loss would rather be
  without moves to the layer where the loss is least. A policy that is learnt chooses
  the layer there; here each is tried.

Not part of `studies.all`: of real pictures a seed takes one core about an hour.
docs/sets.md has what it found.
"""

import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import vpt_jax
from studies import moves, ranks, removal, sets_page, study
from studies.masked import Measure, cross_entropy, measure_of, outcome, split
from studies.selection import fixed
from vpt_jax.condense import keep_mask
from vpt_jax.files import workdirs
from vpt_jax.models.scores import example_values
from vpt_jax.prompts import counts
from vpt_jax.run import stages
from vpt_jax.run.stages import Run

RATIO = 0.1
MEASURED = 64  # pictures that elimination reads
Rows = list[dict[str, Any]]


def run(
    lab: study.Lab,
    *,
    ratio: float = RATIO,
    sizes: Sequence[int] = (5, 20),
    number: int = 200,
) -> study.Result:
    """Measures all parts; every piece is kept in the run's folder as it is done.

    Args:
      lab: The lab.
      ratio: Of the prompts that are kept.
      sizes: Of random sets whose exact removal estimates are compared with.
      number: Of sets of each size.
    """
    seeds = lab.config.seeds
    with study.running(lab) as run:

        def each(part: Callable[..., Rows], *given: Any) -> Rows:
            found = [(seed, part(lab, run, seed, *given)) for seed in seeds]
            return [{"seed": seed, **row} for seed, rows in found for row in rows]

        # Way by way over all seeds: what is stopped early has whole comparisons.
        rows = [row for way in sets_page.WAYS for row in each(_selected, way, ratio)]
        return {
            "seeds": list(seeds),
            "ratio": ratio,
            "rows": rows,
            "doubled": each(_doubled),
            "agreement": each(_agreement, sizes, number),
        }


def _selected(lab: study.Lab, run: Run, seed: int, way: str, ratio: float) -> Rows:
    """Accuracy with the prompts that are kept in one way, fine-tuned and not."""
    start, cpu_s = study.tuned(run, seed), None
    name = f"{way}-{ratio:g}"
    if way == "elimination":
        order, cpu_s = _kept_order(lab, run, seed, start)
        scores = importance_of(order, counts(start["prompts"]))
    else:
        score = "removal" if way in moves.NAMES else way
        scores = stages.scores_of(run, seed, score)
    mask, rows = keep_mask(scores, keep_ratio=ratio), []
    if way in moves.NAMES:  # before tuning it is what the default score keeps
        pool, mask_of = moves.moving(lab, run, seed, way, start, scores, mask)
        found = outcome(run, seed, name, pool, mask_of, tune=True)
        return [{"way": way, "tuned": True, "cpu_s": None, **found._asdict()}]
    for tune in (False, True):
        found = outcome(run, seed, name, start, fixed(mask), tune=tune)
        rows.append({"way": way, "tuned": tune, "cpu_s": cpu_s, **found._asdict()})
    return rows


def eliminate(
    measure: Measure, labels: np.ndarray, m: int, again: float = 0.5
) -> list[int]:
    """The order in which `m` prompts go, the cheapest beside those gone first.

    Of equal ones the later goes first, as `keep_mask` keeps the earlier.

    Args:
      measure: What the network says without some prompts.
      labels: `[n]`.
      m: How many prompts there are.
      again: The share of those left that goes before all is measured again; 0 measures
        again after each.
    """
    there, order = np.ones(m, bool), []
    while (left := np.flatnonzero(there)).size:
        without = there & ~np.eye(m, dtype=bool)[left]
        logits, *others = np.asarray(measure(np.stack([there, *without])), np.float64)
        changes = np.stack(others) - logits
        for _ in range(max(1, int(np.ceil(again * len(left))))):
            losses = np.stack([cross_entropy(logits + d, labels) for d in changes])
            cost = np.where(there[left], losses.mean(axis=1), np.inf)
            at = len(left) - 1 - int(np.argmin(cost[::-1]))
            order.append(int(left[at]))
            there[left[at]] = False
            logits = logits + changes[at]
    return order


def importance_of(order: Sequence[int], num: Sequence[int]) -> tuple[jax.Array, ...]:
    """How late each prompt goes, as `keep_mask` reads it: one `[n_i]` per layer."""
    late = np.empty(len(order), np.float32)
    late[list(order)] = np.arange(len(order))
    return split(late, num)


def _kept_order(
    lab: study.Lab, run: Run, seed: int, trainable: dict[str, Any], name: str = ""
) -> tuple[list[int], float | None]:
    """`eliminate`, kept with the run; and the CPU seconds that it took."""
    path = run.workdir / "sets" / f"seed{seed}-order{name}.json"
    if not path.exists():
        pictures, labels = removal.examples(lab)
        at = np.linspace(0, len(labels) - 1, MEASURED).astype(int)
        measure, clock = measure_of(run, trainable, pictures[at]), time.process_time()
        m = sum(counts(trainable["prompts"]))
        order = eliminate(measure, np.asarray(labels)[at], m)
        cpu_s = round(time.process_time() - clock, 1)
        workdirs.write_json(path, {"order": order, "cpu_s": cpu_s})
        run.log.line(f"seed{seed}: elimination{name}, {cpu_s} s of the CPU")
    found = json.loads(path.read_text(encoding="utf-8"))
    return found["order"], found["cpu_s"]


def _doubled(lab: study.Lab, run: Run, seed: int) -> Rows:
    """Every prompt twice: of how many pairs one is kept when half must go."""
    start = study.tuned(run, seed)
    prompts = tuple(jnp.repeat(p, 2, axis=0) for p in start["prompts"])
    twice, rows = {**start, "prompts": prompts}, []
    for way in ("removal", "elimination"):
        path = run.workdir / "sets" / f"seed{seed}-doubled-{way}.json"
        if not path.exists():
            if way == "removal":
                scores = stages.score_over(run, twice, way)
            else:
                order, _ = _kept_order(lab, run, seed, twice, "-doubled")
                scores = importance_of(order, counts(prompts))
            mask = keep_mask(scores, keep_ratio=0.5)
            found = outcome(run, seed, f"doubled-{way}", twice, fixed(mask), tune=False)
            pairs = np.concatenate(mask).reshape(-1, 2)
            one = float((pairs.sum(axis=1) == 1).mean())
            row = {"way": way, "one_of_each": one, "test": found.test}
            workdirs.write_json(path, row)
        rows.append(json.loads(path.read_text(encoding="utf-8")))
    return rows


def _agreement(
    lab: study.Lab, run: Run, seed: int, sizes: Sequence[int], number: int
) -> Rows:
    """Spearman of estimates with the exact cost of random sets, on 100 pictures."""
    path = run.workdir / "sets" / f"seed{seed}-agreement.json"
    if not path.exists():
        pictures, labels = removal.examples(lab)
        every = max(1, len(labels) // 100)
        data = pictures[::every], np.asarray(labels)[::every]
        costs = set_costs(run, study.tuned(run, seed), data, sizes, number)
        rows = [{"size": size, **_correlations(cost)} for size, cost in costs.items()]
        workdirs.write_json(path, {"rows": rows})
        run.log.line(f"seed{seed}: agreement {json.dumps(rows)}")
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


def _correlations(cost: dict[str, np.ndarray]) -> dict[str, float]:
    exact = cost["exact"]
    names = [name for name in cost if name != "exact"]
    return {n: ranks.spearman(cost[n], exact) for n in names}


def set_costs(
    run: Run,
    trainable: dict[str, Any],
    data: tuple[jax.Array, Any],
    sizes: Sequence[int],
    number: int,
) -> dict[int, dict[str, np.ndarray]]:
    """By size, what removing random sets costs `[number]`, `exact` and by estimates.

    Args:
      run: The run.
      trainable: `{'prompts', 'head'}`.
      data: Normalised pictures and labels.
      sizes: Of the sets.
      number: Of sets of each size.
    """
    (pictures, labels), num = data, counts(trainable["prompts"])
    m, rng = sum(num), np.random.default_rng(0)
    measure = measure_of(run, trainable, pictures)
    logits, *others = measure(np.stack([np.ones(m, bool), *~np.eye(m, dtype=bool)]))
    changes = (np.stack(others) - logits).transpose(1, 0, 2)  # [n, m, k]
    given = run.model, run.backbone, trainable, data, 50
    values = removal.values("removal", *given)
    slopes = np.concatenate(
        [
            np.asarray(_slopes(run.backbone, trainable, batch["image"], run.model))
            for batch in removal.batches(data, 50)
        ]
    )
    result = {}
    for size in sizes:
        # Sets in rows: True is removed.
        sets = np.stack(
            [np.isin(np.arange(m), rng.permutation(m)[:size]) for _ in range(number)]
        )
        exact = cross_entropy(measure(~sets), labels).mean(axis=1)

        def of(change: np.ndarray, sets: np.ndarray = sets) -> np.ndarray:
            moved = [logits + change[:, s].sum(axis=1) for s in sets]
            return np.stack([cross_entropy(z, labels).mean() for z in moved])

        x = values @ sets.T
        result[size] = {
            "exact": exact,
            "mean(s) + mean(s^2) / 2": (x + x * x / 2).mean(axis=0),
            "sum of single scores": np.abs(values).mean(axis=0) @ sets.T,
            "first-order logits": of(slopes),
            "exact single logits": of(changes),
        }
    return result


@functools.partial(jax.jit, static_argnames="model")
def _slopes(
    backbone: Any, trainable: dict[str, Any], pictures: jax.Array, model: Any
) -> jax.Array:
    """What removing each prompt does to each logit by `removal`, `[b, m, k]`."""

    def of(k: jax.Array) -> jax.Array:
        def logit(prompts: Any, **kwargs: Any) -> tuple[jax.Array, dict[str, Any]]:
            inputs = {"params": backbone}
            features, out = model.apply(inputs, pictures, prompts=prompts, **kwargs)
            logits = vpt_jax.apply_head(trainable["head"], features)
            return jnp.take(logits, k, axis=1), out

        values = example_values("removal", logit, trainable["prompts"])
        return jnp.concatenate(values, axis=1)

    classes = trainable["head"]["bias"].shape[0]
    return jnp.moveaxis(jax.lax.map(of, jnp.arange(classes)), 0, -1)


show = sets_page.show


if __name__ == "__main__":
    study.start("sets", sys.modules[__name__])
