"""Inference: weights once, batches in, vectors out; the examples that show it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tinygrad import Tensor, nn

import p2pflop as pf
from p2pflop.client import Client

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PROJECTION_BYTES = 1024 * 256 * 4


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_example", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def embeddings() -> ModuleType:
    return example("embeddings")


def submit(job: pf.Job, client: Client) -> tuple[pf.Result, list[dict[str, Any]]]:
    """The result, and the ``fetching`` events on the way to it."""
    run = pf.submit(job, client=client, fresh=True)
    fetching = [event for event in run.events() if event["kind"] == "fetching"]
    return run.result(timeout=90), fetching


def test_embeddings_are_the_same_as_in_tinygrad_here(
    embeddings: ModuleType, tmp_path: Path
) -> None:
    path = embeddings.write_weights(tmp_path / "encoder.safetensors")
    job = embeddings.make_job(path, batch=599)
    assert (job.steps, job.size_bytes <= 1_000) == (3, True)
    result = job.run_local()
    result.verify()
    vectors = np.concatenate(list(result.collected("vectors")))
    assert vectors.shape == (1797, embeddings.WIDTH)
    assert embeddings.neighbours(vectors) > 0.97
    encoder = embeddings.Encoder()
    nn.state.load_state_dict(encoder, nn.state.safe_load(path), verbose=False)
    pixels, _ = embeddings.digits()
    assert np.allclose(encoder(Tensor(pixels[:7])).numpy(), vectors[:7], atol=1e-6)


def test_an_onnx_model_reads_digits() -> None:
    module = example("onnx_model")
    job = module.make_job()
    assert job.steps == 13
    assert module.accuracy(job.run_local()["chances"]) > 0.9


@pytest.mark.parametrize("name", ["embeddings", "onnx_model"])
def test_the_examples_need_no_compiler_where_they_are_traced(name: str, tmp_path: Path) -> None:
    outcome = subprocess.run(
        [sys.executable, "-c", f"import {name}; print({name}.make_job().size_bytes)"],
        cwd=EXAMPLES,
        env={"CC": "/bin/false", "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert outcome.stdout, outcome.stderr
    assert int(outcome.stdout) <= 1_000


def test_weights_move_once_and_only_to_whom_they_are_a_secret_already(
    embeddings: ModuleType, start_node: Any, wait_until: Any, tmp_path: Path
) -> None:
    seller = start_node("seller", "--ask", "90000")
    ann = start_node("ann", "--connect", seller.addresses()[0])
    bob = start_node("bob", "--connect", seller.addresses()[0])
    for node in (ann, bob):
        wait_until(lambda node=node: len(node.get("/v1/book")["book"]) == 1)
    path = embeddings.write_weights(tmp_path / "encoder.safetensors")
    job = embeddings.make_job(path, batch=599)
    client = Client(ann.home)

    first, fetching = submit(job, client)
    assert fetching[-1]["done_bytes"] == fetching[-1]["total_bytes"] >= PROJECTION_BYTES
    assert embeddings.neighbours(first["vectors"]) > 0.97

    again, fetching = submit(embeddings.make_job(path, batch=1797), client)
    assert fetching == []
    assert np.allclose(again["vectors"].reshape(-1), first["vectors"].reshape(-1), atol=1e-6)

    # The provider has them now, for Ann. Bob's account gets none of that: his own copy travels.
    theirs, fetching = submit(job, Client(bob.home))
    assert fetching[-1]["total_bytes"] >= PROJECTION_BYTES
    assert theirs.hash == first.hash


def test_what_one_job_learned_the_next_one_uses(
    start_node: Any, wait_until: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seller = start_node("seller", "--ask", "90000")
    buyer = start_node("buyer", "--connect", seller.addresses()[0])
    wait_until(lambda: len(buyer.get("/v1/book")["book"]) == 1)
    client = Client(buyer.home)
    draw = np.random.default_rng(0)
    layer = nn.Linear(512, 512)
    layer.weight = Tensor(draw.normal(0, 0.05, (512, 512)).astype(np.float32))
    x = Tensor(draw.normal(0, 1, (16, 512)).astype(np.float32))
    opt = nn.optim.SGD([layer.weight, layer.bias], lr=0.1)

    def train() -> dict[str, Tensor]:
        opt.zero_grad()
        loss = (layer(x) - x).square().mean().backward()
        return {"loss": loss.realize(*opt.schedule_step())}

    trained, _ = submit(pf.trace(train, steps=3), client)
    address = trained.state.address("layer.weight")

    used = nn.Linear(512, 512)
    nn.state.load_state_dict(used, trained.state["layer"].tensors(), verbose=False)
    job = pf.trace(lambda: {"y": used(x)}, steps=1)
    assert bytes.fromhex(address) in job.inputs
    result, fetching = submit(job, client)
    assert fetching == [], "the provider computed them, for this very account"
    weights = trained.state["layer"]
    expected = x.numpy() @ weights["weight"].T + weights["bias"]
    assert np.allclose(result["y"], expected, atol=1e-4)

    monkeypatch.setenv("P2PFLOP_HOME", str(buyer.home))
    kept = pf.load_safetensors(pf.put(weights.save(tmp_path / "layer.safetensors")))
    assert np.array_equal(kept["weight"].numpy(), weights["weight"])
    again = pf.trace(lambda: {"y": kept["weight"].sum(0)}, steps=1)
    assert list(again.inputs) == [bytes.fromhex(address)]
