"""Give your own PyTorch model fused rows: `python examples/own_model.py`.

The model and the loop stay as they are. Two lines change: the embeddings are wrapped, and the optimizer gets what is
left of the parameters.
"""

from __future__ import annotations

import os

# Before torch: idle threads leave the cores free soon, yet are there for the next short kernel.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from torch import Tensor, nn

from vitalfew.embeddings import Adagrad, wrap


class Recommender(nn.Module):
    """A user, an item, and how well they fit."""

    def __init__(self, users: int, items: int, dim: int) -> None:
        super().__init__()
        self.user = nn.Embedding(users, dim)
        self.item = nn.Embedding(items, dim)
        self.top = nn.Sequential(nn.Linear(2 * dim, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return self.top(torch.cat([self.user(user), self.item(item)], dim=1)).squeeze(1)


def main() -> None:
    """Train for 300 steps on clicks that follow a hidden rule, and print what was counted."""
    torch.manual_seed(0)
    users, items = 20_000, 50_000
    model = Recommender(users, items, 16)
    likes = torch.randn(items)
    with wrap(model, Adagrad(lr=0.05)) as few:
        optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)
        for step in range(300):
            user = (users * torch.rand(512) ** 8).long()  # few users and items come up often
            item = (items * torch.rand(512) ** 8).long()
            click = (torch.rand(512) < torch.sigmoid(2 * likes[item])).float()
            loss = nn.functional.binary_cross_entropy_with_logits(model(user, item), click)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 100 == 0:
                print(f"step {step}: loss {loss.item():.3f}")
        for line in few.receipt().lines:
            print(f"{line.what}: {line.before:,.0f} -> {line.after:,.0f} {line.unit} ({line.how})")
    print(f"the model holds plain {type(model.user).__name__} modules again")


if __name__ == "__main__":
    main()
