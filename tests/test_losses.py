"""The loss is InfoNCE in both directions, and negatives come from every worker."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing

from videoclip.losses import contrastive_loss, first_row, gather_with_gradient


def test_loss_of_two_pairs_by_hand() -> None:
    video, text = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    # similarities [[1, 1], [0, 0]]: video -> text is a coin toss; text -> video is right once and wrong once
    right, wrong = math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))
    assert contrastive_loss(video, text).item() == pytest.approx(math.log(2) + (right + wrong) / 2, abs=1e-6)


def test_a_lower_temperature_sharpens() -> None:
    rows = torch.nn.functional.normalize(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    assert contrastive_loss(rows, rows, 0.05) < contrastive_loss(rows, rows, 1.0)


def _worker(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    video, text = (torch.load(f"{folder}/{name}.pt") for name in ("video", "text"))
    rows = slice(0, 3) if rank == 0 else slice(3, 8)  # unequal shares
    v, t = (x[rows].clone().requires_grad_() for x in (video, text))
    gathered = gather_with_gradient(v), gather_with_gradient(t)
    loss = contrastive_loss(v, t, 0.1, gathered, first_row(len(v))) * len(v) / len(video)
    loss.backward()
    torch.save({"loss": loss.detach(), "video": v.grad, "text": t.grad}, f"{folder}/out{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_workers_have_the_loss_and_gradient_of_one(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    video, text = (torch.randn(8, 6, generator=generator) for _ in range(2))
    torch.save(video, tmp_path / "video.pt")
    torch.save(text, tmp_path / "text.pt")
    multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    v, t = video.clone().requires_grad_(), text.clone().requires_grad_()
    loss = contrastive_loss(v, t, 0.1)
    loss.backward()
    outputs = [torch.load(tmp_path / f"out{rank}.pt") for rank in range(2)]
    assert sum(out["loss"] for out in outputs).item() == pytest.approx(loss.item(), rel=1e-5)
    for name, grad in (("video", v.grad), ("text", t.grad)):
        together = torch.cat([out[name] for out in outputs])
        np.testing.assert_allclose(together.numpy(), grad.numpy(), atol=1e-5)
