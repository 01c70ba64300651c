# SPDX-License-Identifier: Apache-2.0
"""Condensation on a dense task: scenes, patch features, training, verdicts, a lab."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_protocol import load

import vpt_jax
from studies import dense, scenes, study, transfer, transfer_page
from vpt_jax import train
from vpt_jax.run import experiment, parsing
from vpt_jax.run.config import TrainConfig

pytestmark = pytest.mark.usefixtures("standard_promotion")
NUM = (3, 0, 4)
MASK = (jnp.array([True, False, True]), jnp.ones(0, bool), jnp.arange(4) == 2)
SIDE, K = 8, len(scenes.CLASSES)


# --- scenes ---------------------------------------------------------------------------


def test_a_scene_is_the_same_at_every_size():
    images, labels = scenes.make_scenes(6, 10, seed=1)
    large_images, large_labels = scenes.make_scenes(6, 30, seed=1)
    # A pixel's centre is the centre of the middle one of the three by three.
    np.testing.assert_array_equal(large_labels[:, 1::3, 1::3], labels)
    off = abs(large_images[:, 1::3, 1::3].astype(int) - images)
    # Rounding to a byte and the sign in checks may fall the other way by the last bit.
    assert (off <= 1).mean() > 0.999


def test_scenes_depend_on_seed_and_number_alone_and_no_two_are_alike():
    images, labels = scenes.make_scenes(200, 16, seed=0)
    again, labels_again = scenes.make_scenes(5, 16, seed=0)
    np.testing.assert_array_equal(again, images[:5])
    np.testing.assert_array_equal(labels_again, labels[:5])
    others = scenes.make_scenes(200, 16, seed=1)[0]
    both = np.concatenate([images, others]).reshape(400, -1)
    assert len(np.unique(both, axis=0)) == 400
    assert set(np.unique(labels)) == set(range(K))


@pytest.mark.parametrize("seed", range(4))
def test_colours_and_places_do_not_depend_on_the_class(seed):
    (first, first_labels), *others = (
        scenes.draw(np.array([kind]), np.random.default_rng(seed), 40)
        for kind in range(1, K)
    )
    for image, labels in others:
        same = (labels > 0) == (first_labels > 0)
        assert (labels[same] > 0).any()
        np.testing.assert_array_equal(image[same], first[same])


@pytest.mark.parametrize("shape", scenes.CLASSES[1:])
def test_all_shapes_of_a_radius_have_one_area(shape):
    points = (np.arange(2000) + 0.5) / 2000 * 4 - 2
    inside = scenes._inside(shape, points, points[:, None])
    # Counted on a grid: the error is the edge's length times the grid's step.
    np.testing.assert_allclose(16 * inside.mean(), np.pi, rtol=2e-3)


def test_scenes_that_cannot_be_drawn_are_refused():
    for num, size in ((-1, 8), (1, 0)):
        with pytest.raises(ValueError, match=f"num={num}, size={size}"):
            scenes.make_scenes(num, size, seed=0)


# --- the dense view of a model --------------------------------------------------------


@pytest.fixture(scope="module")
def problem(tiny):
    """A tiny ViT's dense view, its backbone, `{prompts, head}`, seven scenes."""
    model, backbone = tiny
    prompts = vpt_jax.init_prompts(jax.random.key(1), model, NUM)
    trainable = {
        "prompts": jax.tree.map(lambda p: 5 * p, prompts),
        "head": vpt_jax.init_head(jax.random.key(2), model.width, K),
    }
    images, labels = scenes.make_scenes(7, SIDE, seed=3)
    return dense.dense_patches(model), backbone, trainable, (images, labels)


def prepared(data, part=slice(None), dtype=jnp.float32):
    image = jnp.asarray(data[0][part] / 127.5 - 1, dtype)
    return {"image": image, "label": jnp.asarray(data[1][part])}


@functools.partial(jax.jit, static_argnames=("patches", "formulation"))
def features(backbone, image, prompts, *, patches, formulation="kv"):
    how = {"prompts": prompts, "formulation": formulation}
    return patches.apply({"params": backbone}, image, **how)[0]


def test_patch_features_average_to_the_models_mean_readout(problem):
    patches, backbone, trainable, data = problem
    image, prompts = prepared(data)["image"], trainable["prompts"]
    mean = features(backbone, image, prompts, patches=patches.model)
    found = features(backbone, image, prompts, patches=patches)
    by_place = found.reshape(len(image), -1, found.shape[1])
    np.testing.assert_allclose(by_place.mean(axis=1), mean, atol=1e-5)


def test_patch_features_are_those_of_the_token_formulation(problem):
    patches, backbone, trainable, data = problem
    given = (backbone, prepared(data)["image"], trainable["prompts"])
    found = [
        features(*given, patches=patches, formulation=name) for name in ("kv", "tokens")
    ]
    np.testing.assert_allclose(*found, atol=1e-5, rtol=1e-5)


def test_a_model_that_merges_its_patches_is_refused():
    with pytest.raises(ValueError, match="got Swin; the dense task"):
        dense.dense_patches(vpt_jax.Swin("B"))


# --- loss, score and metrics ----------------------------------------------------------


def stretched(x, side):
    """Bilinear with half-pixel centres along both axes of `[g, g]`, by np.interp."""
    places = (np.arange(side) + 0.5) / side * len(x) - 0.5
    rows = np.array([np.interp(places, np.arange(len(x)), row) for row in x])
    return np.array([np.interp(places, np.arange(len(x)), col) for col in rows.T]).T


def test_pixel_logits_lie_bilinearly_between_their_patches():
    logits = jax.random.normal(jax.random.key(0), (2 * 9, 4))
    found = dense.pixel_logits(logits, 2, 12)
    for n in range(2):
        for k in range(4):
            own = np.asarray(logits).reshape(2, 3, 3, 4)[n, :, :, k]
            np.testing.assert_allclose(found[n, ..., k], stretched(own, 12), atol=1e-5)


def test_the_loss_is_the_mean_cross_entropy_of_all_pixels():
    logits = jax.random.normal(jax.random.key(0), (3 * 4, K))
    label = jax.random.randint(jax.random.key(1), (3, 6, 6), 0, K)
    flat = dense.pixel_logits(logits, 3, 6).reshape(-1, K)
    each = vpt_jax.cross_entropy(flat, {"label": label.reshape(-1)}).reshape(3, -1)
    found = dense.pixel_losses(logits, {"label": label})
    np.testing.assert_allclose(found, each.mean(axis=1), rtol=1e-5)


def test_the_score_is_the_central_difference_of_the_pixel_loss_in_float64(problem):
    patches, backbone, trainable, data = problem
    with jax.enable_x64(True):
        wide = patches.model.clone(dtype=jnp.float64, param_dtype=jnp.float64)
        patches = dense.dense_patches(wide)
        backbone, trainable = jax.tree.map(
            lambda x: jnp.asarray(np.asarray(x), jnp.float64), (backbone, trainable)
        )
        head = trainable["head"]
        batch = prepared(data, slice(3), dtype=jnp.float64)
        given = patches, backbone, trainable, [batch]
        how = {"score": "signed", "loss_fn": dense.pixel_losses}
        scores = vpt_jax.importance(*given, **how)

        @jax.jit
        def loss(gates):
            inputs, prompts = {"params": backbone}, trainable["prompts"]
            features, _ = patches.apply(
                inputs, batch["image"], prompts=prompts, prompt_gate=gates
            )
            return dense.pixel_losses(vpt_jax.apply_head(head, features), batch).mean()

        ones, eps = tuple(jnp.ones(n) for n in NUM), 1e-5
        for i, n in enumerate(NUM):
            for j in range(n):
                up, down = (
                    tuple(g.at[j].add(e) if k == i else g for k, g in enumerate(ones))
                    for e in (eps, -eps)
                )
                slope = (loss(up) - loss(down)) / (2 * eps)
                # Scores are float32; the difference is good to eps squared.
                np.testing.assert_allclose(scores[i][j], -slope, rtol=1e-5, atol=1e-9)
        assert min(abs(s).max() for s in scores if len(s)) > 1e-4


def test_metrics_are_those_of_pixels_counted_one_by_one():
    rng = np.random.default_rng(0)
    truth, answer = rng.integers(0, 3, (2, 5, 6, 6))  # class 3 is nowhere
    truth[truth == 2] = 1  # class 2 only in answers
    confusion = np.zeros((4, 4), int)
    np.add.at(confusion, (truth.ravel(), answer.ravel()), 1)
    iou = [
        ((truth == k) & (answer == k)).sum() / ((truth == k) | (answer == k)).sum()
        for k in range(3)
    ]
    found = dense.metrics(confusion)
    assert found["accuracy"] == pytest.approx(100 * (truth == answer).mean())
    assert found["iou"] == pytest.approx(100 * np.mean(iou))


def test_every_pixel_counts_once_whatever_the_batch(problem):
    patches, backbone, trainable, data = problem
    mask = tuple(jnp.ones(n, bool) for n in NUM)
    how = {"patches": patches, "recipe": train.Recipe()}
    found = [
        dense.confusion(trainable, backbone, data, size, mask, **how) for size in (7, 3)
    ]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0].sum(1), np.bincount(data[1].ravel()))


# --- training -------------------------------------------------------------------------

SETTINGS = TrainConfig(
    epochs=2, warmup_epochs=0.0, base_lr=8.0, weight_decay=0.0, batch_size=3
)


def fitted(problem, prompts, mask, settings=SETTINGS, **recipe):
    patches, backbone, trainable, data = problem
    given = {**trainable, "prompts": prompts}, backbone, data, settings, 0, mask
    recipe = train.Recipe(dropout=0.0, **recipe)
    return dense.fit(*given, patches=patches, recipe=recipe)


def test_masked_training_is_condensed_training(problem):
    prompts = problem[2]["prompts"]
    masked = fitted(problem, prompts, MASK)
    small = vpt_jax.condense(prompts, MASK)
    condensed = fitted(problem, small, None)
    kept = {**masked, "prompts": vpt_jax.condense(masked["prompts"], MASK)}
    # Six steps of float32 rounding.
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-4), kept, condensed
    )
    moved = [
        abs(a - b).max() for a, b in zip(small, kept["prompts"], strict=True) if a.size
    ]
    assert min(moved) > 1e-3
    for before, after, m in zip(prompts, masked["prompts"], MASK, strict=True):
        np.testing.assert_array_equal(before[~m], after[~m])


def test_a_training_that_diverges_is_an_error(problem):
    wild = dataclasses.replace(SETTINGS, base_lr=1e30, weight_decay=0.01)
    with pytest.raises(FloatingPointError, match="lower base_lr"):
        fitted(problem, problem[2]["prompts"], MASK, wild)


# --- the study ------------------------------------------------------------------------


def result(losses):
    """A result whose modes lose so many points of all prompts' mIoU, by seed."""
    noise = np.array([0.4, -0.3, 0.1])
    rows = []
    for seed in range(len(losses["full"])):
        kinds = [("none", 0.0), ("full", 1.0)]
        plan = transfer.PLAN.items()
        kinds += [(mode, ratio) for ratio, modes in plan for mode in modes]
        for mode, ratio in kinds:
            iou = 50 + noise[seed] - losses.get(mode, losses["full"])[seed]
            numbers = {"accuracy": iou + 30, "iou": iou}
            row = {"seed": seed, "mode": mode, "ratio": ratio, "counts": [2, 1]}
            rows.append({**row, "val": numbers, "test": numbers})
    picture = np.zeros((2, 4, 4, 3), int).tolist()
    labels = np.zeros((2, 4, 4), int).tolist()
    shown = dict.fromkeys(("truth", "full", "kept"), labels)
    return {
        "seeds": list(range(len(losses["full"]))),
        "num_prompts": 6,
        "score": "removal",
        "sizes": dict(transfer.SIZES),
        "side": 4,
        "rows": rows,
        "shown": {"image": picture, **shown},
    }


@pytest.mark.parametrize(
    ("layer", "kept", "random", "expected"),
    [
        ((2.1, 2.3, 2.2), (0.1, 0.2, 0.3), (5, 6, 5), "supported"),
        ((0.1, 0.2, 0.0), (3.1, 3.2, 3.3), (1, 1.5, 1), "not supported"),
        ((1.0, 1.0, 1.0), (0.0, 3.0, 1.0), (2, 1, 1), "undecided"),
        ((9.0,), (0.1,), (9.0,), "undecided"),  # one seed decides nothing
    ],
)
def test_verdicts_follow_the_data(layer, kept, random, expected):
    losses = {"layer": layer, "global": kept, "random": random}
    losses["full"] = (0.0,) * len(kept)
    found = transfer.show(result(losses)).verdicts
    assert [v.verdict for v in found] == [expected] * 3


ONE_RATIO = {0.3: tuple(transfer_page.MODES)}
SIZES = {"train": 5, "val": 3, "test": 4}


@pytest.fixture
def small_lab(tmp_path, tiny):
    """A tiny backbone that has learnt nothing, and a recipe of two epochs."""
    model, backbone = tiny
    values = load("demo", "digits,smoke,seeds=2").to_dict()
    values["prompts"] |= {"num_prompts": 3}
    info = {"name": "tiny", "normalisation": "half", "load": {}}
    info["hash"] = vpt_jax.backbone_hash(backbone)
    loaded = experiment.Model(model, backbone, info)
    # The study draws its own pictures.
    return study.Lab(parsing.parse(values), tmp_path / "out", loaded, None)


def check_what_is_released(lab, rows):
    """A condensed file, without a mask, has the accuracy that was measured."""
    bench = transfer.make_bench(lab, SIZES)
    for row in rows:
        if row["seed"] or row["mode"] not in ("none", "global"):
            continue
        unit = transfer.Unit(row["seed"], row["mode"], row["ratio"])
        saved = vpt_jax.load_prompts(bench.folder / f"{unit.name}.safetensors")
        assert list(vpt_jax.counts(saved.prompts)) == row["counts"]
        trainable = {"prompts": saved.prompts, "head": saved.head}
        given = trainable, lab.model.backbone, bench.splits["test"], 4, None
        how = {"patches": bench.patches, "recipe": train.Recipe()}
        confusion = dense.confusion(*given, **how)
        # A pixel on the border between two classes may fall the other way.
        for name, value in dense.metrics(confusion).items():
            assert value == pytest.approx(row["test"][name], abs=1.0)


@pytest.mark.slow
def test_a_killed_study_goes_on_to_the_same_end(small_lab, tmp_path, monkeypatch):
    run = functools.partial(transfer.run, plan=ONE_RATIO, sizes=SIZES)
    whole = run(small_lab)
    assert json.loads(json.dumps(whole)) == whole
    assert len(whole["rows"]) == 2 * (2 + len(transfer_page.MODES))

    fit, calls = dense.fit, []

    def killed(*args, **kwargs):
        calls.append(args)
        if len(calls) in (3, 6):
            raise KeyboardInterrupt
        return fit(*args, **kwargs)

    monkeypatch.setattr(dense, "fit", killed)
    other = small_lab._replace(workdir=tmp_path / "other")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(other)
    again = run(other)
    for found in (whole, again):
        found["rows"] = [{**row, "seconds": 0.0} for row in found["rows"]]
    assert again == whole
    done = len(calls)
    assert done == 2 * (2 + 4) + 2  # not fine-tuned is not trained; two were killed
    assert run(other)["shown"] == whole["shown"] and len(calls) == done

    kept = {r["mode"]: sum(r["counts"]) for r in whole["rows"]}
    assert kept == dict.fromkeys(transfer_page.MODES, 3) | {"none": 0, "full": 9}
    check_what_is_released(small_lab, whole["rows"])
    section = transfer.show(whole)
    assert study.html(section).count("<svg") == 2
    study.print_section(section)


def test_a_plan_without_what_the_claims_are_about_is_refused(small_lab):
    with pytest.raises(ValueError, match=r"lacks \['layer', 'random'\] at 0\.3"):
        transfer.run(small_lab, plan={0.3: ("global",)}, sizes=SIZES)
