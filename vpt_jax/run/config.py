# SPDX-License-Identifier: Apache-2.0
"""Every key of a run's config: its type, its default, and what it may be.

A config file states what differs; `parsing.py` reads it into these dataclasses.
"""

import dataclasses
import importlib
import math
from collections.abc import Sequence
from typing import Any, cast

from vpt_jax.condense import SCOPES
from vpt_jax.data.pictures import RULES
from vpt_jax.data.tasks import SPLITS
from vpt_jax.files.checks import check_integer
from vpt_jax.files.messages import expect, shown
from vpt_jax.models.attention import ATTENTIONS
from vpt_jax.models.inputs import NORMALISATIONS
from vpt_jax.models.posemb import RESIZES
from vpt_jax.models.scores import DEFAULT_SCORE, REDUCTIONS, SCORES, Score
from vpt_jax.models.vit import NORMS, READOUTS, REMATS
from vpt_jax.models.xla import ACTIVATIONS
from vpt_jax.prompts import INITS, check_choice
from vpt_jax.train import OPTIMIZERS, SCHEDULES
from vpt_jax.weights.published import published

MAX_PROMPTS = 10_000  # per layer; the papers have 200, and more only fill memory
MAX_SIDE = 4096  # px; larger pictures only fill memory
MAX_SEED = 2**32 - 1  # NumPy's and JAX's generators take these
BASELINES = ("linear", "random", "scratch")
DIVERGED = ("error", "last_finite")
HEAD_INITS = ("reference", "zeros", "probe")


def positive(**values: int | float) -> None:
    """Raises ValueError unless every value is above 0 and finite."""
    for name, value in values.items():
        expect(0 < value < math.inf, name, value, "a finite number greater than 0")


def no_repeats(name: str, values: Sequence[Any]) -> None:
    """Raises ValueError if a value is there twice."""
    twice = [value for value in values if values.count(value) > 1]
    if twice:
        raise ValueError(f"{name} has {twice[0]} twice; expected each value once.")


def check_seeds(name: str, seeds: Sequence[int]) -> None:
    """Raises ValueError unless there is a seed, and each once."""
    right = seeds and len(set(seeds)) == len(seeds)
    expect(right, name, tuple(seeds), "at least one, no repeats")


def check_prompts(num: int | tuple[int, ...]) -> None:
    """Raises ValueError unless there is a prompt, and not more than fit in memory."""
    each = (num,) if isinstance(num, int) else num
    right = sum(each) and 0 <= min(each) <= max(each) <= MAX_PROMPTS
    many = f"at least one, and of each layer 0 to {MAX_PROMPTS:,}"
    expect(right, "prompts.num_prompts", num, many)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Which data set, and where its files lie if it does not ship with the package.

    `resize` is for VTAB and own pictures: one of `pictures.RULES`, or empty for what
    `load_task` says. `skip_broken` leaves broken pictures of a folder out. `splits` is
    what of it is used, see `load_task`.
    """

    name: str
    data_dir: str = ""
    resize: str = ""
    skip_broken: bool = False
    splits: str = "all"

    def __post_init__(self) -> None:
        check_choice("task.resize", self.resize, ("", *RULES))
        check_choice("task.splits", self.splits, SPLITS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Pretrained weights, see `load_backbone`.

    Empty fields take what is known of the checkpoint. The name of a published file is
    replaced by its address and says which variant it is, whatever the config's file has
    for others. `remat` saves memory for time in training, `attention` is the kernel,
    see `ViT`. `share` is how many devices hold one copy of the backbone between them.
    """

    variant: str
    checkpoint: str = ""
    image_size: int = 0
    readout: str = ""
    norm: str = ""
    resize: str = ""
    skip: tuple[str, ...] = ()
    normalisation: str = ""
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "products"
    num_heads: int = 0
    activation: str = ""
    epsilon: float = 0.0
    share: int = 1

    def __post_init__(self) -> None:
        if named := published(self.checkpoint):
            object.__setattr__(self, "checkpoint", named.address)
            object.__setattr__(self, "variant", named.variant)
        check_choice("backbone.attention", self.attention, ATTENTIONS)
        kernel = "bfloat16 with backbone.attention 'cudnn', whose kernel takes no other"
        right = self.attention != "cudnn" or self.dtype == "bfloat16"
        expect(right, "backbone.dtype", self.dtype, kernel)
        check_choice("backbone.remat", self.remat, tuple(REMATS))
        check_choice("backbone.readout", self.readout, ("", *READOUTS))
        check_choice("backbone.norm", self.norm, ("", *NORMS))
        check_choice("backbone.activation", self.activation, ("", *ACTIVATIONS))
        check_integer("backbone.share", self.share, 1)
        check_choice("backbone.resize", self.resize, ("", *RESIZES))
        check_choice("backbone.dtype", self.dtype, ("float32", "bfloat16"))
        known = ("", *NORMALISATIONS)
        check_choice("backbone.normalisation", self.normalisation, known)
        own = f"0 (the file's own) to {MAX_SIDE:,}"
        for name in ("num_heads", "image_size"):
            value = getattr(self, name)
            expect(0 <= value <= MAX_SIDE, f"backbone.{name}", value, own)
        own = "0 (the file's own), or a small number"
        expect(0 <= self.epsilon < 1, "backbone.epsilon", self.epsilon, own)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """`num_prompts` per layer (one number, or one per layer).

    `init` is one of `init_prompts`'; `head_init` is where the head starts: as the
    `reference` draws it, from `zeros`, or from the linear `probe`.

    `dropout_shared` drops the same elements for all examples of a step, see
    `prompt_dropout`: less work, another recipe than the reference's.
    """

    num_prompts: int | tuple[int, ...]
    deep: bool = True
    dropout: float = 0.1
    dropout_shared: bool = False
    init: str = "reference"
    head_init: str = "reference"

    def __post_init__(self) -> None:
        check_choice("prompts.init", self.init, INITS)
        check_choice("prompts.head_init", self.head_init, HEAD_INITS)
        expect(0 <= self.dropout < 1, "prompts.dropout", self.dropout, "0 to below 1")
        right = self.dropout or not self.dropout_shared
        expect(right, "prompts.dropout_shared", True, "False with prompts.dropout 0")
        check_prompts(self.num_prompts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One stage's recipe.

    The rate is `base_lr / 256 * batch_size` for SGD and `base_lr` for AdamW. The head's
    is `head_lr` for features at unit scale (AdamW only), or the same if that is 0. With
    `optimizer="lbfgs"` the linear probe is the optimum of `probe.py`, which has no
    rates and epochs; its decay is chosen on val, or `weight_decay` where there is none.
    """

    epochs: int
    warmup_epochs: float
    base_lr: float
    weight_decay: float
    batch_size: int
    optimizer: str = "sgd"
    schedule: str = "epoch"
    head: bool = True  # finetune only: train the head too
    head_lr: float = 0.0

    def __post_init__(self) -> None:
        positive(epochs=self.epochs, base_lr=self.base_lr, batch_size=self.batch_size)
        check_choice("optimizer", self.optimizer, (*OPTIMIZERS, "lbfgs"))
        right = not self.head_lr or self.optimizer == "adamw"
        expect(right, "head_lr", self.head_lr, f"0 with optimizer {self.optimizer!r}")
        check_choice("schedule", self.schedule, SCHEDULES)
        right, warm = 0 <= self.warmup_epochs < self.epochs, self.warmup_epochs
        expect(right, "warmup_epochs", warm, f"0 to below epochs, {shown(self.epochs)}")
        for name in ("weight_decay", "head_lr"):
            value = getattr(self, name)
            expect(0 <= value < math.inf, name, value, "0 or more, and finite")


def find_score(name: str) -> str | Score:
    """A score by its name, or the function that `module:function` names.

    Raises:
      ValueError: If there is neither.
    """
    module, colon, function = name.partition(":")
    if not colon:
        check_choice("score.score", name, SCORES)
        return name
    try:
        found: Any = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"score.score is {shown(name)} ({error}); expected module:function, where"
            " the module can be imported from this folder."
        ) from error
    expect(callable(found), "score.score", name, "the name of a function")
    return cast(Score, found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """How prompts are scored; an empty reduction is the score's own.

    `score` is one of `condense.SCORES`, or `module:function` for one of your own, see
    `condense.Score`.
    """

    score: str = DEFAULT_SCORE
    reduction: str = ""
    batch_size: int = 64

    def __post_init__(self) -> None:
        find_score(self.score)
        check_choice("score.reduction", self.reduction, ("", *REDUCTIONS))
        positive(score_batch_size=self.batch_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CondenseConfig:
    """Which condensed models are made: every ratio with every scope."""

    keep_ratios: tuple[float, ...]
    scopes: tuple[str, ...] = ("global", "layer")

    def __post_init__(self) -> None:
        # As the models' files are called: two that print alike would be one.
        no_repeats("condense.keep_ratios", [f"{x:g}" for x in self.keep_ratios])
        no_repeats("condense.scopes", self.scopes)
        for ratio in self.keep_ratios:
            part = "each above 0 and below 1; all prompts are always evaluated"
            expect(0 < ratio < 1, "condense.keep_ratios", ratio, part)
        for scope in self.scopes:
            check_choice("condense.scopes", scope, SCOPES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run.

    `diverged` is what happens to a training whose loss or prompts become infinite or
    NaN: an `error`, or it ends with its `last_finite` epoch, as in VPT's sweeps.
    """

    task: TaskConfig
    backbone: BackboneConfig
    prompts: PromptConfig
    linear: TrainConfig
    tune: TrainConfig
    score: ScoreConfig
    condense: CondenseConfig
    finetune: TrainConfig
    seeds: tuple[int, ...] = (0,)
    baselines: tuple[str, ...] = BASELINES
    eval_batch_size: int = 250
    checkpoint_every: int = 10  # epochs
    diverged: str = "error"

    def __post_init__(self) -> None:
        positive(
            eval_batch_size=self.eval_batch_size, checkpoint_every=self.checkpoint_every
        )
        check_choice("diverged", self.diverged, DIVERGED)
        for name in ("tune", "finetune"):
            check_choice(f"{name}.optimizer", getattr(self, name).optimizer, OPTIMIZERS)
        right = self.linear.optimizer != "lbfgs" or self.linear.weight_decay
        needed = "a decay above 0 with optimizer 'lbfgs', such as 0.01"
        expect(right, "linear.weight_decay", self.linear.weight_decay, needed)
        check_seeds("seeds", self.seeds)
        right = 0 <= min(self.seeds) <= max(self.seeds) <= MAX_SEED
        expect(right, "seeds", self.seeds, f"each from 0 to {MAX_SEED}")
        no_repeats("baselines", self.baselines)
        for name in self.baselines:
            check_choice("baselines", name, BASELINES)
