# SPDX-License-Identifier: Apache-2.0
"""Published files by name: the table, and the way from a name to a loaded model.

Files come from a server on this machine that speaks the hub's protocol; no test here
needs a network.
"""

import errno
import hashlib
import json
import re
import runpy
from pathlib import Path

import hub_server
import huggingface_hub.file_download
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_config
from safetensors.numpy import save
from test_naming import NAMES, flat_vit, pytorch

import vpt_jax
from vpt_jax.models.variants import canonical
from vpt_jax.models.vit import NAMED_VARIANTS
from vpt_jax.run import parsing
from vpt_jax.weights import __main__ as command
from vpt_jax.weights.published import MEGABYTES, PUBLISHED, Published, published
from vpt_jax.weights.release import source_of

# Of the demo's sizes, so that a test takes no 88 MB; by its name of timm's AugReg.
SMALL = "vit_demo_patch16_32.augreg_in21k"
WEIGHTS = f"timm/{SMALL}/model.safetensors"
CONFIG = f"timm/{SMALL}/config.json"


@pytest.fixture(scope="module")
def weights():
    arrays = pytorch(flat_vit(), NAMES["timm"])
    return save({n: np.ascontiguousarray(a) for n, a in arrays.items()})


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VPT_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "hub"


@pytest.fixture
def hub(monkeypatch, cache, weights):
    with hub_server.serve(monkeypatch, cache) as hub:
        monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 4096)
        hub.files[WEIGHTS] = weights
        yield hub


def left(cache):
    """Names of files with content in the cache."""
    found = [p for p in cache.rglob("*") if p.is_file() and p.name != "CACHEDIR.TAG"]
    own = {"refs", ".no_exist", ".locks"}
    return [p.name for p in found if own.isdisjoint(p.parts)]


# --- the table ------------------------------------------------------------------------


@pytest.mark.parametrize("variant", sorted(MEGABYTES))
def test_sizes_are_those_of_the_networks(variant):
    side = 518 if variant.endswith("/14") and variant != "H/14" else 224
    kind = vpt_jax.Swin if variant.startswith("Swin") else vpt_jax.ViT
    model = kind(variant.removesuffix(" map"), image_size=side)
    if variant.endswith(" map"):
        model = model.clone(class_token=False, readout="map")
    if side == 518:
        model = model.clone(layer_scale=True)

    def size(model):
        images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        params = jax.eval_shape(model.init, jax.random.key(0), images)
        return 4e-6 * sum(x.size for x in jax.tree.leaves(params))

    if kind is vpt_jax.Swin:
        expected = size(model)
    else:  # all blocks are alike, and tracing forty takes long
        one, two = (size(model.clone(depth=depth)) for depth in (1, 2))
        expected = one + (model.depth - 1) * (two - one)
    assert abs(MEGABYTES[variant] / expected - 1) < 0.006


def test_every_name_has_its_family_and_its_variant():
    rows = PUBLISHED.values()
    maps = [row for row in rows if row.family.readout == "map"]
    used = {row.variant for row in rows if row not in maps}
    assert used | {f"{row.variant} map" for row in maps} == set(MEGABYTES)
    assert all(row.megabytes in MEGABYTES.values() for row in rows)
    for name, row in PUBLISHED.items():
        assert row.name == name and row.variant in row.family.variants.split()
        assert canonical(name) in (name, row.variant)
        assert published(name) == published(name.removeprefix("timm/")) == row
        assert row.family.card()["licence"] == row.family.licence
    assert sum(canonical(name) == row.variant for name, row in PUBLISHED.items()) > 100


def test_clips_files_have_other_names():
    """As the repositories' own pages list them: no `model.safetensors`."""
    for name, file in (
        ("timm/vit_base_patch16_clip_224.openai", "open_clip_model.safetensors"),
        ("openai/clip-vit-base-patch32", "pytorch_model.bin"),
        ("timm/vit_base_patch16_clip_224.laion2b", "model.safetensors"),
    ):
        row = published(name)
        assert row is not None and row.address == f"hf://{name}/{file}"
        assert "CLIP" in row.family.name


def test_what_is_no_name_keeps_its_meaning(tmp_path, monkeypatch):
    others = ("vit_base_patch16_224", "ViT-B/16", "B16", "Swin-T", "mine/weights", "")
    paths = ("a/ViT-B_16.npz", "hf://timm/a/b", "mae_pretrain_vit_base.pth", "../x")
    for name in (*NAMED_VARIANTS, *others, *paths):
        assert published(name) is None, name
    model, _ = vpt_jax.load_backbone("demo/4")
    assert model.variant == "demo/4"
    with pytest.raises(ValueError, match="given for 'B/16'.*or a name: vit_base_patch"):
        vpt_jax.load_backbone("B/16")
    # What lies here comes first.
    monkeypatch.chdir(tmp_path)
    assert published("ViT-B_16") is not None
    Path("ViT-B_16").touch()
    assert published("ViT-B_16") is None


def test_the_list_is_narrow_plain_and_in_the_docs(capsys):
    assert command.main(["list"]) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, printed)) <= 110 and "\x1b" not in "".join(printed)
    names = [line.split()[0] for line in printed[2 : 2 + len(PUBLISHED)]]
    assert names == list(PUBLISHED)
    docs = Path(__file__).parents[2] / "docs" / "backbones.md"
    assert "\n".join(printed).strip() in docs.read_text(encoding="utf-8")
    assert command.main(["list", "dinov3-vits16-"]) == 0
    meta = capsys.readouterr().out
    assert "DINOv3 (gated)" in meta and "facebook/dinov3-vits16-pretrain" in meta
    assert command.main(["list", "vit_small_patch16_dinov3"]) == 0
    assert "DINOv3\n" in re.sub(" +\n", "\n", capsys.readouterr().out)
    assert command.main(["list", "DINO_"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 4 + 3


# --- from a name to a model -----------------------------------------------------------


def test_a_name_loads_and_the_second_time_nothing_is_asked(hub, cache):
    beside = {"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    config = {"architecture": "vit_demo_patch16_32", "model_args": {"num_heads": 2}}
    hub.files[CONFIG] = json.dumps(config | beside).encode()
    model, backbone = vpt_jax.load_backbone(SMALL)
    assert (model.depth, model.width, model.num_heads) == (6, 128, 2)
    assert hub.downloads() == [CONFIG, WEIGHTS]
    hub.requests.clear()
    for args in ((SMALL,), (f"timm/{SMALL}",), ("demo/16", SMALL)):
        again, same = vpt_jax.load_backbone(*args)
        assert again.num_heads == 2
        jax.tree.map(np.testing.assert_array_equal, backbone, same)
    card = vpt_jax.read_card(SMALL)
    assert (card["normalisation"], card["licence"]) == ("half", "Apache-2.0")
    assert hub.requests == []


def test_the_tables_variant_is_held_against_the_file(hub, monkeypatch):
    row = Published("wrong", "S/16", f"hf://{WEIGHTS}")
    monkeypatch.setitem(PUBLISHED, "wrong", row)
    with pytest.raises(ValueError, match="holds a 'demo/16', not 'S/16'"):
        vpt_jax.load_backbone("wrong")


def test_a_broken_connection_is_taken_up_again(hub):
    hub.cuts = [8192, 4096]
    _, backbone = vpt_jax.load_backbone(SMALL)
    ranges = [span for method, _, span in hub.requests if method == "GET"]
    assert ranges == [None, "bytes=8192-", "bytes=12288-"]
    hub.requests.clear()
    _, same = vpt_jax.load_backbone(SMALL)
    jax.tree.map(np.testing.assert_array_equal, backbone, same)
    assert hub.requests == []


def test_what_fails_leaves_nothing_and_can_be_tried_again(
    hub, cache, weights, monkeypatch
):
    def refused(message):
        with pytest.raises(vpt_jax.CheckpointError, match=message):
            vpt_jax.load_backbone(SMALL)
        assert left(cache) == []

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    hub.cuts = [8192] + [0] * 6
    refused("cannot be fetched")
    hub.cuts = []
    hub.announced[WEIGHTS] = hashlib.sha256(b"another").hexdigest()
    refused(f"its SHA-256 is {hashlib.sha256(weights).hexdigest()[:12]}")
    hub.announced.clear()
    hub.gated.add(WEIGHTS)
    refused(f"accept at https://huggingface.co/timm/{SMALL} \\(then")
    hub.gated.clear()
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.file_download, "http_get", full)
        refused(r"Free some room.*HF_HOME")
    assert vpt_jax.load_backbone(SMALL)[0].width == 128


def test_offline_one_sentence_says_what_to_fetch_and_where_to_put_it(
    cache, tmp_path, weights, monkeypatch
):
    hub_server.unplug(monkeypatch)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    url = f"https://huggingface.co/timm/{SMALL}/resolve/main/model.safetensors"
    place = f"{SMALL}/model.safetensors"
    bucket = "https://storage.googleapis.com/vit_models/imagenet21k/ViT-B_16.npz"
    for name, said in [
        (SMALL, f"download {url} elsewhere, keep it as {place}, and pass"),
        ("ViT-B_16", f"{bucket} elsewhere, keep it as ViT-B_16.npz,"),
    ]:
        with pytest.raises(vpt_jax.CheckpointError, match=said):
            vpt_jax.load_backbone(name)
    # There it is known by its folder.
    path = tmp_path / place
    path.parent.mkdir()
    path.write_bytes(weights)
    vpt_jax.load_backbone(path)
    assert vpt_jax.read_card(path)["normalisation"] == "half"


# --- the command ----------------------------------------------------------------------


def test_the_name_alone_is_enough_for_the_command():
    for file, arg in (("folder", "DIR"), ("vtab", "search"), ("swin", "")):
        config = load_config(f"configs/{file}.py", arg)
        config.backbone.checkpoint = "timm/vit_small_patch14_dinov2.lvd142m"
        given, kind = dict(config.backbone), parsing.GROUPS["backbone"]
        settings = parsing.build(kind, given, "config.backbone.")
        assert settings.variant == "S/14"
        address = "hf://timm/vit_small_patch14_dinov2.lvd142m/model.safetensors"
        assert settings.checkpoint == address
    assert source_of("ViT-B_16") == "gs://vit_models/imagenet21k/ViT-B_16.npz"


def test_list_runs_as_a_program(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["weights", "list", "siglip9"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(command.__file__, run_name="__main__")
    assert "got 'siglip9', expected a part" in capsys.readouterr().err
