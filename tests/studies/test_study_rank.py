# SPDX-License-Identifier: Apache-2.0
"""Attention's singular values, ranks, fits; and what docs/rank_bound.md proves."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_study_prompts import few_digits

import vpt_jax
from studies import growth, rank, rank_page, spectra, study
from studies.spectra import energy_rank, entropy_rank

pytestmark = pytest.mark.usefixtures("standard_promotion")
DOC = (Path(__file__).parents[2] / "docs" / "rank_bound.md").read_text()

matrices_of = jax.jit(spectra.attention_matrices, static_argnums=0)


def norm(x, p):
    x = np.asarray(x, np.float64)
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    return x * np.asarray(p["scale"]) + np.asarray(p["bias"])


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def by_hand(backbone, layer, tokens):
    """Attention `[b, h, t, t]` of a layer, in NumPy."""
    block = backbone["Transformer"][f"encoderblock_{layer}"]
    y = norm(tokens, block["LayerNorm_0"])
    attention = block["MultiHeadDotProductAttention_0"]
    q, k = (
        np.einsum("btd,dhc->bhtc", y, np.asarray(attention[name]["kernel"], np.float64))
        + np.asarray(attention[name]["bias"])[:, None]
        for name in ("query", "key")
    )
    return softmax(np.einsum("bhqc,bhtc->bhqt", q, k) / np.sqrt(q.shape[-1]))


def with_prompts(tokens, p):
    """Class token, prompts, patches."""
    p = np.broadcast_to(np.asarray(p), (len(tokens), *p.shape))
    return np.concatenate([tokens[:, :1], p, tokens[:, 1:]], axis=1)


@pytest.mark.parametrize("m", [0, 3])
def test_matrices_are_those_of_the_model_with_prompts_as_keys(tiny, getkey, m):
    model, backbone = tiny
    images = jax.random.normal(getkey(), (2, 8, 8, 3))
    prompts = vpt_jax.init_prompts(getkey(), model, m)
    found = matrices_of(model, backbone, images, prompts)
    apply = jax.jit(lambda *x: model.apply({"params": x[0]}, x[1], prompts=x[2])[1])
    out = apply(backbone, images, prompts)
    inputs = [out["embedded"], *(block["tokens"] for block in out["blocks"][:-1])]
    assert len(found) == model.depth
    for layer, (a, x) in enumerate(zip(found, inputs, strict=True)):
        expected = by_hand(backbone, layer, with_prompts(np.asarray(x), prompts[layer]))
        np.testing.assert_allclose(a, expected, atol=2e-5)
        np.testing.assert_allclose(a.sum(-1), 1, atol=1e-5)
        # The tokens' rows are those of prompts as keys and values alone.
        if layer < model.depth - 1:
            rows = np.delete(a, np.arange(1, 1 + m), axis=2)
            own = out["blocks"][layer]["prompt_attention"]
            np.testing.assert_allclose(rows[..., 1 : 1 + m], own, atol=2e-5)


def test_the_tokens_block_of_the_model_is_rescaled_row_by_row(tiny, getkey):
    model, backbone = tiny
    images = jax.random.normal(getkey(), (2, 8, 8, 3))
    prompts = vpt_jax.init_prompts(getkey(), model, 4)
    bare = vpt_jax.init_prompts(getkey(), model, 0)
    # The first layer: later ones see other tokens once there are prompts.
    a = np.asarray(matrices_of(model, backbone, images, bare)[0])
    b = np.asarray(matrices_of(model, backbone, images, prompts)[0])
    own = np.delete(b, np.arange(1, 5), axis=2)
    scale = 1 - own[..., 1:5].sum(-1, keepdims=True)
    own = np.delete(own, np.arange(1, 5), axis=3)
    np.testing.assert_allclose(own, scale * a, atol=1e-6)


def test_singular_values_are_numpys(tiny, getkey):
    model, backbone = tiny
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    prompts = vpt_jax.init_prompts(getkey(), model, 3)
    how = {"model": model, "normalisation": "half", "deep": True}
    values, mass = spectra.singular_values(backbone, prompts, images, **how)
    normal = jnp.asarray(images, jnp.float32) / 127.5 - 1
    found = matrices_of(model, backbone, normal, prompts)
    for layer, a in enumerate(np.asarray(found, np.float64)):
        rows = np.delete(a, [1, 2, 3], axis=2)
        block = np.delete(rows, [1, 2, 3], axis=3)
        for name, matrix in (("all", a), ("rows", rows), ("block", block)):
            expected = np.linalg.svd(matrix, compute_uv=False)
            np.testing.assert_allclose(values[name][layer], expected, atol=1e-5)
        expected = rows[..., 1:4].sum(-1).mean(-1)
        np.testing.assert_allclose(mass[layer], expected, atol=1e-5)


def test_ranks_of_matrices_that_are_known():
    identity = np.ones(20, np.float32)
    assert [energy_rank(identity, s) for s in (0.9, 0.95, 0.99)] == [18, 19, 20]
    assert entropy_rank(identity) == pytest.approx(20)
    one = np.linalg.svd(np.outer([1, 2, 3], [1, 1, 2]), compute_uv=False)
    assert energy_rank(one, 0.99) == 1
    assert entropy_rank(one) == pytest.approx(1, abs=1e-6)
    # Squares 9, 4, 1 of 14; shares 3/6, 2/6, 1/6.
    known = np.array([[3.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    assert energy_rank(known, 9 / 14).tolist() == [1, 1]
    assert energy_rank(known, 0.9).tolist() == [2, 1]
    assert energy_rank(known, 0.95).tolist() == [3, 1]
    entropy = -(0.5 * np.log(0.5) + np.log(1 / 3) / 3 + np.log(1 / 6) / 6)
    np.testing.assert_allclose(entropy_rank(known), [np.exp(entropy), 1])
    assert entropy_rank(np.array([1.0, 1, 0]), 2) == pytest.approx(2)
    np.testing.assert_allclose(spectra.cumulative(known)[0], [1 / 2, 5 / 6, 1])


@pytest.mark.parametrize("form", growth.GROWTH)
def test_a_planted_growth_is_recovered_and_predicted(form):
    x = np.array(rank.PROMPTS) / 65
    slopes = np.array([[2.0], [-5.0]])
    y = 3 + slopes * growth.GROWTH[form](x)
    a, b = growth.fit(x, y, form)
    np.testing.assert_allclose(a, 3)
    np.testing.assert_allclose(b, slopes[:, 0])
    errors = {f: growth.held_out(x, y, f) for f in growth.GROWTH}
    assert errors[form].max() < 1e-9
    assert all(e.min() > 0.1 for f, e in errors.items() if f != form)


def planted(form, noise=0.05, slope=5.0, seeds=3):
    """A result whose ranks grow as `form` says, in 4 layers of 2 heads.

    Every seed and share of the pictures has noise of its own.
    """
    rng, n = np.random.default_rng(0), 65
    rows = []
    for m in rank.PROMPTS:
        for seed in range(seeds if m else 1):
            r = 10 + slope * growth.GROWTH[form](m / n)
            r = r + rng.normal(0, noise, (seeds, 4, 2))
            ranks = {name: r.tolist() for name in spectra.MEASURES}
            rows.append(
                {
                    **{"kind": "random", "seed": seed, "m": m},
                    "mass": np.zeros((4, 2)).tolist(),
                    "ranks": dict.fromkeys(spectra.MATRICES, ranks),
                }
            )
    fits = growth.growth_fits(rows, n, ("all", "rows"), tuple(spectra.MEASURES))
    return {"tokens": n, "rows": rows, "fits": fits}


def test_no_two_repetitions_share_a_prompt_or_a_picture():
    ranks = np.arange(9.0).reshape(3, 3)[..., None, None]  # 3 * seed + share
    np.testing.assert_array_equal(growth.repetitions(ranks).ravel(), [0, 4, 8])
    # Without prompts there is one seed for all.
    np.testing.assert_array_equal(growth.repetitions(ranks[:1]).ravel(), [0, 1, 2])


def test_a_fit_of_repetitions_is_that_of_each(getkey):
    result = planted("log", seeds=2)
    found = result["fits"]["rows"]["95"]["sqrt"]
    table = growth.table_of(result["rows"], "random", "rows", "95")
    assert [len(ranks) for ranks in table.values()] == [1] + [2] * 9
    x = np.array(list(table)) / 65
    for i in range(2):
        y = [(ranks[i] if m else ranks[0])[i, 1, 1] for m, ranks in table.items()]
        expected = growth.held_out(x, np.array(y), "sqrt")
        # As written: four digits.
        assert found["held_out"][i][1][1] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("form", "about", "expected"),
    [
        ("log", {}, "supported"),
        ("linear", {}, "not supported"),
        ("sqrt", {}, "undecided"),
        ("log", {"noise": 3.0}, "undecided"),
        ("linear", {"seeds": 1}, "undecided"),
        ("linear", {"slope": -1.0}, "supported"),
    ],
)
def test_the_verdict_on_growth_follows_from_the_errors(form, about, expected):
    found = rank_page.growth_verdict(planted(form, **about), "all")
    assert found.verdict == expected
    assert "± inf" not in found.because or "seeds" in about
    assert ("it does not grow" in found.because) == ("slope" in about)


def test_the_verdict_on_low_rank_follows_its_rule():
    def verdict(result, matrix="all"):
        return rank_page.low_rank_verdict(result, matrix).verdict

    assert verdict(planted("log")) == "supported"
    # 10 + 20 * 200 / 65 is more than half of 65, less than half of 265.
    faster = planted("linear", slope=20.0)
    assert verdict(faster) == "supported"
    assert verdict(faster, "rows") == "not supported"
    # One seed of three in which no head stays low: neither.
    mixed = planted("log")
    for row in mixed["rows"]:
        if row["m"] == 200 and row["seed"] == 1:
            row["ranks"] = {"rows": {"95": np.full((3, 4, 2), 60.0).tolist()}}
    assert verdict(mixed, "rows") == "undecided"
    full = planted("log")
    for row in full["rows"]:
        row["ranks"] = {"all": {"95": np.full((3, 4, 2), 60.0).tolist()}}
    assert verdict(full) == "not supported"


def softmax_pair(seed, n=12, m=5, c=4, size=2.0):
    """Attention of n queries without prompts `[n, n]`, with prompts `[n, n + m]`."""
    rng = np.random.default_rng(seed)
    logits = size * rng.normal(size=(n, c)) @ rng.normal(size=(c, n + m))
    more = size * rng.normal(size=(m, c)) @ rng.normal(size=(c, n + m))
    return softmax(logits[:, :n]), softmax(logits), softmax(more)


def svd(a):
    return np.linalg.svd(a, compute_uv=False)


def density_entropy(a):
    return np.log(entropy_rank(svd(a), 2))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("m", [1, 5, 11])
def test_what_the_page_proves(seed, m):
    n = 12
    a, rows, more = softmax_pair(seed, n, m, c=2, size=0.5 + seed / 4)
    scaled, extra = rows[:, :n], rows[:, n:]
    d = scaled.sum(axis=1)  # 1 - the mass on prompts, without its rounding
    np.testing.assert_allclose(scaled, d[:, None] * a)  # the identity
    everything = np.concatenate([rows, more])
    # Singular values, and 3, energy ranks.
    s, t, u, v = svd(a), svd(scaled), svd(rows), svd(everything)
    assert np.all(u >= t - 1e-12) and np.all(t >= d.min() * s - 1e-12)
    assert np.all(t <= d.max() * s + 1e-12)
    assert np.all(u[m:] <= t[: n - m] + 1e-12)
    assert np.all(v[2 * m :] <= t[: max(0, n - m)] + 1e-12)
    for share in (0.5, 0.9, 0.95, 0.99):
        k = energy_rank(t, share)
        assert energy_rank(u, share) <= k + m
        assert energy_rank(v, share) <= k + 2 * m
        # 4. Prompts with little attention add nothing.
        tail = (t[k:] ** 2).sum() + (extra**2).sum()
        assert (u[k:] ** 2).sum() <= tail + 1e-12
        assert (extra**2).sum() <= ((1 - d) ** 2).sum() + 1e-12
    # 5. Entropy of the energy.
    w = (scaled**2).sum() / (rows**2).sum()
    mixed = w * density_entropy(scaled) + (1 - w) * density_entropy(extra)
    spread = -w * np.log(w) - (1 - w) * np.log(1 - w)
    assert mixed - 1e-9 <= density_entropy(rows) <= mixed + spread + 1e-9
    assert density_entropy(extra) <= np.log(min(n, m)) + 1e-9


@pytest.mark.parametrize("m", [1, 3, 7, 10])
@pytest.mark.parametrize("seed", range(5))
def test_a_prompt_adds_at_most_one_to_the_rank_and_as_a_token_two(seed, m):
    rng, n, r = np.random.default_rng(seed), 12, 4
    keys = rng.normal(size=(8, r))[:, np.arange(n) % r]  # 4 distinct ones: rank 4
    keys = np.concatenate([keys, rng.normal(size=(8, m))], axis=1)
    logits = rng.normal(size=(n + m, 8)) @ keys / 2
    everything = softmax(logits)
    rows, rank_of = everything[:n], np.linalg.matrix_rank
    assert rank_of(softmax(logits[:n, :n])) == rank_of(rows[:, :n]) == r
    assert rank_of(rows) == min(n, r + m)  # of random keys, the most there can be
    assert r <= rank_of(everything) <= min(n + m, r + 2 * m)


def test_extra_keys_can_add_a_rank_each():
    # Keys of tokens are 0, so A has rank 1; q and prompts are numbers: Vandermonde.
    n, q = 8, np.linspace(-1.5, 1.5, 8)
    for m in range(1, n):
        logits = np.outer(q, np.r_[np.zeros(n), np.linspace(1, 4, m)])
        assert np.linalg.matrix_rank(softmax(logits[:, :n])) == 1
        s = svd(softmax(logits))
        assert (s > 1e-12 * s[0]).sum() == m + 1


def test_a_fixed_vector_needs_rank_one_and_all_values_the_width_of_a_head():
    rng = np.random.default_rng(0)
    a, values = softmax(rng.normal(size=(30, 30))), rng.normal(size=(30, 4))
    close = a @ values @ np.linalg.pinv(values)
    np.testing.assert_allclose(close @ values, a @ values)
    assert np.linalg.matrix_rank(close) == 4


def test_the_page_has_the_numbers_that_the_code_computes():
    table = re.findall(r"^\| (\d[\d./]*) \|(.*)\|$", DOC, re.MULTILINE)
    assert len(table) == 5
    for epsilon, cells in table:
        e = 2 / 3 if epsilon == "2/3" else float(epsilon)
        expected = [spectra.linformer_rank(n, e) for n in (65, 197, 397, 1024)]
        assert [int(c) for c in cells.split("|")] == [round(x) for x in expected]
    grid = np.linspace(0.01, 0.99, 99)
    assert min(spectra.linformer_rank(173, e) for e in grid) > 173
    assert spectra.linformer_rank(176, 2 / 3) < 176
    assert "n = 175" in DOC
    assert 33.75 * np.log(1 + 200 / 197) == pytest.approx(23.6, abs=0.1)


@pytest.fixture(scope="module")
def lab(tmp_path_factory, standard_promotion):
    return few_digits(tmp_path_factory.mktemp("rank"))


def test_a_small_lab_is_measured_the_same_every_time(lab):
    small = {"prompts": (0, 1, 2, 5), "trained": (2,), "pictures": 20}
    result = rank.run(lab, **small)
    text = json.dumps(result, allow_nan=False)
    assert text == json.dumps(rank.run(lab, **small), allow_nan=False)
    kinds = [(row["kind"], row["seed"], row["m"]) for row in result["rows"]]
    first = [("random", 0, m) for m in (0, 1, 2, 5)] + [("trained", 0, 2)]
    second = [("random", 1, m) for m in (1, 2, 5)] + [("trained", 1, 2)]
    assert kinds == first + second
    assert (result["tokens"], result["pictures"]) == (5, 20)
    for row in result["rows"]:
        for matrix, ranks in row["ranks"].items():
            most = 5 + row["m"] if matrix == "all" else 5
            for values in ranks.values():
                assert np.shape(values) == (2, 3, 2)
                assert np.all((np.array(values) >= 1) & (np.array(values) <= most))
    for by_measure in result["fits"].values():
        for forms in by_measure.values():
            assert set(forms) == set(growth.GROWTH)
            assert np.isfinite([forms[f]["held_out"] for f in forms]).all()
    section = rank.show(json.loads(text))
    assert [v.verdict in study.VERDICTS for v in section.verdicts] == [True] * 6
    assert study.html(section).count("<svg") == 3


def test_a_batch_that_is_not_full_counts_its_pictures_once(lab, monkeypatch):
    images = rank.sample(lab, 6)
    prompts = vpt_jax.init_prompts(jax.random.key(0), lab.model.model, 2)
    whole = rank.measure(lab, images, prompts)
    monkeypatch.setattr(rank, "BATCH", 4)
    parts = rank.measure(lab, images, prompts)
    np.testing.assert_allclose(parts["ranks"]["all"]["95"], whole["ranks"]["all"]["95"])
    # Shares are of every second picture; both of one size, so their mean is the mean.
    how = {"model": lab.model.model, "normalisation": "half", "deep": True}
    values, _ = spectra.singular_values(lab.model.backbone, prompts, images, **how)
    for name in ("99", "effective"):
        ranks = spectra.MEASURES[name](values["rows"])
        expected = [ranks[:, ::2].mean(axis=1), ranks[:, 1::2].mean(axis=1)]
        # As written: four digits.
        np.testing.assert_allclose(whole["ranks"]["rows"][name], expected, atol=1e-4)


def test_what_cannot_be_measured_is_one_error(lab):
    swin = lab.model._replace(model=vpt_jax.Swin("B"))
    with pytest.raises(ValueError, match="needs a ViT"):
        rank.run(lab._replace(model=swin))
    pictures = lab.pictures._replace(task=lab.pictures.task._replace(test=None))
    with pytest.raises(ValueError, match="test pictures"):
        rank.run(lab._replace(pictures=pictures))
