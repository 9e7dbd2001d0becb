"""InfoNCE over a whole batch: what is near, what is not, and what nobody knows.

In: vectors of queries and of their passages, and which texts they are. Out: the loss. sentence-transformers' cached loss
embeds and carries the gradients (GradCache, arXiv 2101.06983); here stands which pairs count. Memory moves nothing: the
batch's negatives are the same whatever the micro batch is.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

ROWS = 1024  # rows of the similarity matrix that are in memory at once
Columns = Iterable[dict[str, torch.Tensor]]


class InfoNCE(CachedMultipleNegativesRankingLoss):  # type: ignore[misc]  # untyped
    """Cross-entropy of each query's positive among all passages of the batch (arXiv 1807.03748, 1705.00652).

    Left out of the sum: passages of the same family as the positive (copies and pieces of one document), answers to a
    query of the same family, and what is nearer to the query than the positive by `margin`: unmarked answers
    (Qwen3-Embedding, arXiv 2506.05176, eq. 2). `symmetric`: passages look for their queries as well. With a teacher's
    vectors, `alpha` of the loss is KL to the teacher's distribution over the same passages.

    labels: [batch, 2 (2 + k)]: numbers of the texts of each row (query, positive, k negatives), then for each of these
    columns where a row's text stands in its features, which are sorted by length so that little is padding.
    """

    def __init__(
        self, model: Any, *, temperature: float, micro_batch: int, families: torch.Tensor, margin: float | None,
        symmetric: bool, bf16: bool, teacher: torch.Tensor | None = None, alpha: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(model, scale=1.0 / temperature, mini_batch_size=micro_batch)
        self.families, self.margin, self.symmetric, self.bf16 = families, margin, symmetric, bf16
        self.teacher, self.alpha = teacher, alpha
        self.cached = True

    def embed_minibatch(self, *args: Any, **kwargs: Any) -> Any:
        """The second forward runs inside backward, out of the trainer's autocast: both run in this one."""
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.bf16):
            vectors, state = super().embed_minibatch(*args, **kwargs)
        return vectors.float(), state

    def forward(self, sentence_features: Columns, labels: torch.Tensor) -> torch.Tensor:
        """One pass where a batch is in memory whole: its activations are kept. Else two, chunk by chunk. The loss is
        taken backward to the vectors at once in both, as Matryoshka expects of it."""
        columns = list(sentence_features)
        if self.cached or not torch.is_grad_enabled():
            loss: torch.Tensor = self.forward_cached(columns, labels)
            return loss
        vectors = [
            [found[0] for found in self.embed_minibatch_iter(column, with_grad=True, copy_random_state=False)]
            for column in columns
        ]
        leaves = [[one.detach().requires_grad_() for one in column] for column in vectors]
        value = self.calculate_loss(leaves, labels, with_backward=True)
        made, ends = (list(chain.from_iterable(column)) for column in (vectors, leaves))
        # what has the loss's gradient; its own value is taken off again
        carrier = torch.stack([(one * end.grad).sum() for one, end in zip(made, ends, strict=True)]).sum()
        return value + (carrier - carrier.detach())

    def calculate_loss(
        self, reps: list[list[torch.Tensor]], labels: torch.Tensor, *, with_backward: bool = False
    ) -> torch.Tensor:
        """The loss from the vectors of every chunk. Matryoshka hands in prefixes of them."""
        width = len(reps)
        numbers, places = labels[:, :width], labels[:, width:]
        columns = [
            torch.nn.functional.normalize(torch.cat(column), dim=-1)[places[:, i]]
            for i, column in enumerate(reps)
        ]
        queries, passages = columns[0], torch.cat(columns[1:])
        rows = len(queries)
        which = numbers[:, 1:].T.reshape(-1)  # the numbers of `passages`
        # the positive in the place of a missing negative: for no query a passage of its own
        filled = (numbers[:, 1:] == numbers[:, 1:2]).T.reshape(-1)
        filled[:rows] = False
        total = torch.zeros((), device=queries.device)
        for begin in range(0, rows, ROWS):
            end = min(begin + ROWS, rows)
            loss = self._rows(queries, passages, numbers, which, filled, begin, end) / rows
            if with_backward:
                loss.backward(retain_graph=end < rows)  # type: ignore[no-untyped-call]
                loss = loss.detach()
            total = total + loss
        return total

    def _rows(
        self, queries: torch.Tensor, passages: torch.Tensor, numbers: torch.Tensor, which: torch.Tensor,
        filled: torch.Tensor, begin: int, end: int,
    ) -> torch.Tensor:  # fmt: skip
        """Summed loss of rows begin..end."""
        here, batch = torch.arange(begin, end, device=queries.device), len(queries)
        families = self.families.to(queries.device)
        near = queries[begin:end] @ passages.T
        own = near.gather(1, here[:, None])
        wrong = families[which][None] == families[numbers[begin:end, 1]][:, None]
        # answers alone: what was mined for a query, the same one or another, answers neither
        wrong[:, :batch] |= families[numbers[:, 0]][None] == families[numbers[begin:end, 0]][:, None]
        wrong |= filled
        asked = wrong[:, :batch].clone()
        if self.margin is not None:
            wrong |= near.detach() > own.detach() + self.margin
        wrong.scatter_(1, here[:, None], False)
        loss = self._entropy(near, wrong, here)
        if self.symmetric:
            back = passages[begin:end] @ queries.T
            if self.margin is not None:  # the same doubt: this passage may answer that query
                asked |= back.detach() > (queries * passages[:batch]).sum(1).detach() + self.margin
            asked.scatter_(1, here[:, None], False)
            loss = 0.5 * (loss + self._entropy(back, asked, here))
        if self.teacher is not None:
            theirs = self.teacher.to(queries.device)
            wanted = (theirs[numbers[begin:end, 0]] @ theirs[which].T) * self.scale
            wanted = wanted.masked_fill(wrong, -torch.inf).log_softmax(1)
            ours = (near * self.scale).masked_fill(wrong, -torch.inf).log_softmax(1)
            gap = torch.where(wrong, 0.0, wanted.exp() * (wanted - ours).masked_fill(wrong, 0.0)).sum()
            loss = (1.0 - self.alpha) * loss + self.alpha * gap
        return loss

    def _entropy(self, near: torch.Tensor, wrong: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        scores = (near * self.scale).masked_fill(wrong, -torch.inf)
        return torch.nn.functional.cross_entropy(scores, target, reduction="sum")
