# SPDX-License-Identifier: Apache-2.0
"""VPT-Deep against a plain PyTorch version of it, prompts as tokens of every block.

Written from the papers: class token, prompts, patches; every layer's prompts take the
place of the previous layer's outputs; SGD with momentum and coupled L2, the head's bias
without. Nothing of it is shared with the package.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch.nn import functional as F

import vpt_jax
from vpt_jax import train
from vpt_jax.weights.vpt import load_vpt, save_vpt

SIDE, CLASSES, NUM, BATCH = 112, 7, 10, 4
RATE, DECAY = 0.05, 0.01


def plain_features(state, images, prompts):
    """Class token `[b, d]`; `state` has timm's names, `prompts` is one per layer."""
    x = F.conv2d(
        images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], 16
    )
    x = x.flatten(2).transpose(1, 2)
    b, _, d = x.shape
    x = torch.cat([state["cls_token"].expand(b, -1, -1), x], 1) + state["pos_embed"]
    patches = x[:, 1:]
    cls = x[:, :1]
    for i, layer_prompts in enumerate(prompts):
        w = {
            n.removeprefix(f"blocks.{i}."): t
            for n, t in state.items()
            if n.startswith(f"blocks.{i}.")
        }
        n = len(layer_prompts)
        x = torch.cat([cls, layer_prompts.expand(b, -1, -1), patches], 1)
        y = F.layer_norm(x, (d,), w["norm1.weight"], w["norm1.bias"], 1e-6)
        y = F.linear(y, w["attn.qkv.weight"], w["attn.qkv.bias"])
        q, k, v = (
            part.reshape(b, -1, 6, d // 6).transpose(1, 2) for part in y.split(d, 2)
        )
        y = torch.softmax(q @ k.transpose(2, 3) / (d // 6) ** 0.5, -1) @ v
        y = y.transpose(1, 2).reshape(b, -1, d)
        x = x + F.linear(y, w["attn.proj.weight"], w["attn.proj.bias"])
        y = F.layer_norm(x, (d,), w["norm2.weight"], w["norm2.bias"], 1e-6)
        y = F.gelu(F.linear(y, w["mlp.fc1.weight"], w["mlp.fc1.bias"]))
        x = x + F.linear(y, w["mlp.fc2.weight"], w["mlp.fc2.bias"])
        cls, patches = x[:, :1], x[:, 1 + n :]
    return F.layer_norm(cls[:, 0], (d,), state["norm.weight"], state["norm.bias"], 1e-6)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A ViT-S/16 in both worlds, a batch, and the same prompts and head."""
    torch.manual_seed(0)
    torch_model = timm.create_model(
        "vit_small_patch16_224", num_classes=0, img_size=SIDE
    )
    state = {
        n: t + torch.randn_like(t) * (0.02 if t.ndim > 1 else 0.1)
        for n, t in torch_model.state_dict().items()
    }
    path = tmp_path_factory.mktemp("parity") / "vit.safetensors"
    safetensors.torch.save_file(state, path)
    model, backbone = vpt_jax.load_backbone("S/16", path, num_heads=6)
    keys = jax.random.split(jax.random.key(0), 4)
    trainable = {
        "prompts": vpt_jax.init_prompts(keys[0], model, NUM),
        "head": vpt_jax.init_head(keys[1], model.width, CLASSES),
    }
    batch = {
        "image": jax.random.randint(keys[2], (BATCH, SIDE, SIDE, 3), 0, 256).astype(
            jnp.uint8
        ),
        "label": jax.random.randint(keys[3], (BATCH,), 0, CLASSES),
        "mask": jnp.ones(BATCH, bool),
    }
    return model, backbone, trainable, batch, state


class Plain:
    """Prompts, head and forward pass of the PyTorch side."""

    def __init__(self, trainable, batch, state):
        self.state = state
        self.prompts = [self.leaf(p) for p in trainable["prompts"]]
        self.kernel = self.leaf(trainable["head"]["kernel"])
        self.bias = self.leaf(trainable["head"]["bias"])
        images = torch.tensor(np.asarray(batch["image"])).permute(0, 3, 1, 2)
        self.images = (images / 255 - 0.5) / 0.5
        self.labels = torch.tensor(np.asarray(batch["label"]), dtype=torch.long)

    @staticmethod
    def leaf(x):
        return torch.tensor(np.asarray(x)).requires_grad_()

    def logits(self):
        return (
            plain_features(self.state, self.images, self.prompts) @ self.kernel
            + self.bias
        )

    def loss(self):
        return F.cross_entropy(self.logits(), self.labels)


def relative(ours, theirs):
    theirs = theirs.detach().numpy()
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def test_logits_and_gradients(case):
    model, backbone, trainable, batch, state = case
    recipe = train.Recipe(dropout=0.0)

    @jax.jit
    def ours(trainable):
        def loss(trainable):
            logits = train.predict(
                trainable, backbone, batch["image"], model=model, recipe=recipe
            )
            return vpt_jax.cross_entropy(logits, batch).mean(), logits

        return jax.grad(loss, has_aux=True)(trainable)

    grads, logits = ours(trainable)
    plain = Plain(trainable, batch, state)
    plain.loss().backward()
    assert relative(logits, plain.logits()) < 1e-4
    assert relative(grads["head"]["kernel"], plain.kernel.grad) < 1e-4
    for g, p in zip(grads["prompts"], plain.prompts, strict=True):
        assert float(jnp.abs(g).max()) > 0
        assert relative(g, p.grad) < 1e-4


def test_ten_steps_of_sgd(case):
    model, backbone, trainable, batch, state = case
    recipe = train.Recipe(dropout=0.0)
    step = jax.jit(train.train_step, static_argnames=("model", "recipe"))
    ours = train.init_state(trainable, recipe)
    plain = Plain(trainable, batch, state)
    optimiser = torch.optim.SGD(
        [
            {"params": [*plain.prompts, plain.kernel], "weight_decay": DECAY},
            {"params": [plain.bias], "weight_decay": 0.0},
        ],
        lr=RATE,
        momentum=0.9,
    )
    first = float(plain.loss().detach())
    for _ in range(10):
        optimiser.zero_grad()
        plain.loss().backward()
        optimiser.step()
        ours, _ = step(
            ours,
            backbone,
            batch,
            jnp.float32(RATE),
            jnp.float32(DECAY),
            jax.random.key(0),
            model=model,
            recipe=recipe,
        )
    assert float(plain.loss().detach()) < 0.5 * first  # something was learned
    assert relative(ours.trainable["head"]["kernel"], plain.kernel) < 1e-3
    assert relative(ours.trainable["head"]["bias"], plain.bias) < 1e-3
    for before, after, p in zip(
        trainable["prompts"], ours.trainable["prompts"], plain.prompts, strict=True
    ):
        # The change, not the value: prompts move little in ten steps.
        moved = torch.tensor(np.asarray(before))
        assert relative(after - before, p.detach() - moved) < 1e-3


def test_checkpoints_of_vpts_code(case, tmp_path):
    """Names and shapes as KMnP/vpt's modules have them, written and read by PyTorch."""
    model, backbone, trainable, batch, state = case
    plain = Plain(trainable, batch, state)
    save_vpt(tmp_path / "ours.pth", *trainable.values(), model=model)
    theirs = torch.load(tmp_path / "ours.pth", weights_only=True)["model"]
    first = theirs["enc.transformer.prompt_embeddings"]
    later = theirs["enc.transformer.deep_prompt_embeddings"]
    assert first.shape == (1, NUM, 384) and later.shape == (11, NUM, 384)
    features = plain_features(state, plain.images, [*first, *later])
    head = torch.nn.Linear(384, CLASSES)
    own = {
        n.removeprefix("head.last_layer."): x for n, x in theirs.items() if "head" in n
    }
    head.load_state_dict(own)
    logits = train.predict(
        trainable, backbone, batch["image"], model=model, recipe=train.Recipe()
    )
    assert relative(logits, head(features)) < 1e-4
    # As fvcore's checkpointer writes a training, with what else it holds.
    more = {"model": theirs, "optimizer": {"state": {}}, "iteration": 7}
    torch.save(more, tmp_path / "model_final.pth")
    prompts, found, deep = load_vpt(tmp_path / "model_final.pth", model)
    assert deep
    for a, b in zip(prompts, trainable["prompts"], strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(found["kernel"], trainable["head"]["kernel"])
