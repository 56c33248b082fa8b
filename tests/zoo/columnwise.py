"""One id per field: ``nn.Embedding`` on columns, by name, on slices of a float matrix, or one table with offsets."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo.entry import Batch, Entry, columns, dense, field_ranges, mlp, names

ROWS = (30, 12, 7, 21)
FIELDS = len(ROWS)
DIM = 4


class PerColumn(nn.Module):
    """A table per column of an integer matrix, of widths that grow with the rows."""

    def __init__(self) -> None:
        super().__init__()
        widths = [min(8, (rows + 1) // 2) for rows in ROWS]
        self.embeds = nn.ModuleList(nn.Embedding(rows, width) for rows, width in zip(ROWS, widths, strict=True))
        self.layers = mlp(sum(widths) + 3, 16, 2)

    def forward(self, x_cat: torch.Tensor, x_cont: torch.Tensor) -> torch.Tensor:
        x = torch.cat([e(x_cat[:, i]) for i, e in enumerate(self.embeds)], 1)
        return self.layers(torch.cat([x, x_cont], 1))


class ByName(nn.Module):
    """A dict batch, tables by name; a dict of outputs, one a task."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = {"user": 30, "item": 12, "hour": 7, "city": 21}
        self.embed_dict = nn.ModuleDict({name: nn.Embedding(rows, DIM) for name, rows in self.sizes.items()})
        self.towers = nn.ModuleDict({task: mlp(4 * DIM + 2, 8, 1) for task in ("click", "buy")})

    def forward(self, x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        embedded = [self.embed_dict[name](x[name]).unsqueeze(1) for name in self.sizes]
        numbers = torch.stack([x["price"], x["age"]], dim=1)
        joined = torch.cat([torch.cat(embedded, dim=1).flatten(start_dim=1), numbers], dim=1)
        return {task: torch.sigmoid(tower(joined).squeeze(1)) for task, tower in self.towers.items()}


def named_batch(samples: int, generator: torch.Generator) -> Batch:
    ids = columns((30, 12, 7, 21), samples, generator).unbind(1)
    numbers = {name: torch.rand(samples, generator=generator) for name in ("price", "age")}
    return (dict(zip(("user", "item", "hour", "city"), ids, strict=True)) | numbers,)


class FloatColumns(nn.Module):
    """Everything in one float matrix; column slices cast to ids; width-1 tables for the linear part."""

    def __init__(self) -> None:
        super().__init__()
        self.index = {f"C{i}": (i, i + 1) for i in range(FIELDS)} | {"I": (FIELDS, FIELDS + 3)}
        self.embedding_dict = nn.ModuleDict({f"C{i}": nn.Embedding(rows, DIM) for i, rows in enumerate(ROWS)})
        self.linear_dict = nn.ModuleDict({f"C{i}": nn.Embedding(rows, 1) for i, rows in enumerate(ROWS)})
        self.weight = nn.Parameter(torch.randn(3, 1) * 0.1)
        self.dnn = mlp(FIELDS * DIM + 3, 8, 1)

    def look_up(self, X: torch.Tensor, tables: nn.ModuleDict) -> list[torch.Tensor]:
        return [table(X[:, self.index[n][0] : self.index[n][1]].long()) for n, table in tables.items()]

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        numbers = X[:, self.index["I"][0] : self.index["I"][1]]
        linear = torch.cat(self.look_up(X, self.linear_dict), dim=-1).sum(dim=-1) + numbers.matmul(self.weight)
        vectors = torch.cat(self.look_up(X, self.embedding_dict), dim=1)
        square_of_sum = torch.pow(torch.sum(vectors, dim=1, keepdim=True), 2)
        sum_of_square = torch.sum(vectors * vectors, dim=1, keepdim=True)
        fm = 0.5 * torch.sum(square_of_sum - sum_of_square, dim=2)
        return torch.sigmoid(linear + fm + self.dnn(torch.cat([torch.flatten(vectors, start_dim=1), numbers], -1)))


def float_batch(samples: int, generator: torch.Generator) -> Batch:
    return (torch.cat([columns(ROWS, samples, generator).float(), torch.rand(samples, 3, generator=generator)], 1),)


class FeaturesLinear(nn.Module):
    """The linear part of a factorization machine: a width-1 table of all fields."""

    def __init__(self, offsets_as: str) -> None:
        super().__init__()
        self.fc = nn.Embedding(sum(ROWS), 1)
        self.bias = nn.Parameter(torch.zeros((1,)))
        self.offsets = start_rows(self, offsets_as)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sum(self.fc(shifted(x, self.offsets)), dim=1) + self.bias


class FeaturesEmbedding(nn.Module):
    def __init__(self, offsets_as: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sum(ROWS), DIM)
        self.offsets = start_rows(self, offsets_as)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.embedding(shifted(x, self.offsets))


def start_rows(module: nn.Module, kind: str) -> torch.Tensor | tuple[int, ...]:
    starts = torch.tensor((0, *ROWS[:-1])).cumsum(0)
    if kind == "list":
        return tuple(starts.tolist())
    module.register_buffer("offsets", starts)
    return starts


def shifted(x: torch.Tensor, offsets: torch.Tensor | tuple[int, ...]) -> torch.Tensor:
    if isinstance(offsets, torch.Tensor):
        return x + offsets
    return x + x.new_tensor(offsets).unsqueeze(0)


class JointFM(nn.Module):
    """A factorization machine on one table of all fields; a deep part beside it where asked."""

    def __init__(self, offsets_as: str, deep: bool) -> None:
        super().__init__()
        self.linear = FeaturesLinear(offsets_as)
        self.embedding = FeaturesEmbedding(offsets_as)
        self.mlp = mlp(FIELDS * DIM, 8, 1) if deep else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        vectors = self.embedding(x)
        square_of_sum = torch.sum(vectors, dim=1) ** 2
        sum_of_square = torch.sum(vectors**2, dim=1)
        out = self.linear(x) + 0.5 * torch.sum(square_of_sum - sum_of_square, dim=1, keepdim=True)
        if self.mlp is not None:
            out = out + self.mlp(vectors.view(-1, FIELDS * DIM))
        return torch.sigmoid(out.squeeze(1))


def id_batch(samples: int, generator: torch.Generator) -> Batch:
    return (columns(ROWS, samples, generator),)


class LooseParameters(nn.Module):
    """No embedding module at all: parameters, and the function."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ParameterList(nn.Parameter(torch.randn(rows, DIM)) for rows in ROWS)
        self.bias_of_item = nn.Parameter(torch.zeros(ROWS[1], 1))
        self.head = nn.Parameter(torch.randn(FIELDS * DIM + 3, 1))

    def forward(self, ids: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        vectors = [F.embedding(column, table) for column, table in zip(ids.T, self.tables, strict=True)]
        bias = F.embedding(ids[:, 1], self.bias_of_item)
        return torch.hstack([*vectors, numbers]) @ self.head + bias


class FieldAware(nn.Module):
    """A field-aware factorization machine: every field has as many tables as there are fields."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(sum(ROWS), DIM) for _ in ROWS)
        self.linear = FeaturesLinear("list")
        self.register_buffer("starts", torch.tensor((0, *ROWS[:-1])).cumsum(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        linear = self.linear(x)
        x = x + self.starts
        xs = [table(x) for table in self.embeddings]
        products = [xs[j][:, i] * xs[i][:, j] for i in range(FIELDS - 1) for j in range(i + 1, FIELDS)]
        return torch.sigmoid((linear + torch.stack(products, dim=1).sum(dim=1).sum(dim=1, keepdim=True)).squeeze(1))


class ScaledByFrequency(nn.Module):
    """Gradients of a row divided by how often the batch names it."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, DIM, scale_grad_by_freq=True) for rows in ROWS)
        self.head = mlp(FIELDS * DIM, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([table(ids[..., i]) for i, table in enumerate(self.tables)], dim=-1))


def ids_and_numbers(samples: int, generator: torch.Generator) -> Batch:
    return columns(ROWS, samples, generator), dense(samples, 3, generator)


JOINT = field_ranges("linear.fc", ROWS) | field_ranges("embedding.embedding", ROWS)

COLUMNWISE = (
    Entry("per_column", PerColumn, ids_and_numbers, names("embeds", 4)),
    Entry("by_name", ByName, named_batch, frozenset(f"embed_dict.{n}" for n in ("user", "item", "hour", "city"))),
    Entry(
        "float_columns",
        FloatColumns,
        float_batch,
        frozenset(f"{kind}_dict.C{i}" for kind in ("embedding", "linear") for i in range(4)),
    ),
    Entry("fm_joint_buffer", lambda: JointFM("buffer", deep=False), id_batch, JOINT),
    Entry("deepfm_joint_new_tensor", lambda: JointFM("list", deep=True), id_batch, JOINT),
    Entry("loose_parameters", LooseParameters, ids_and_numbers, names("tables", 4) | {"bias_of_item"}),
    Entry(
        "field_aware",
        FieldAware,
        id_batch,
        field_ranges("linear.fc", ROWS).union(*(field_ranges(f"embeddings.{i}", ROWS) for i in range(4))),
    ),
    Entry("scaled_by_frequency", ScaledByFrequency, id_batch, names("tables", 4)),
)
