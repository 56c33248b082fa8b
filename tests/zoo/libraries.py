"""Models of deepctr-torch, torch-rechub and TorchRec as they come, and batches for them.

Importing this module imports the three libraries; they are in the extra ``test``.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any
from unittest import mock

import torch
from torch import nn

from tests.zoo.entry import Batch, Entry

# deepctr-torch starts a thread when it is imported that asks the network for its newest version.
with mock.patch.object(threading.Thread, "start"):
    import deepctr_torch.models as deepctr
    from deepctr_torch.inputs import DenseFeat, SparseFeat, VarLenSparseFeat
import torch_rechub.models.ranking as rechub
from torch_rechub.basic.features import DenseFeature, SequenceFeature, SparseFeature

with warnings.catch_warnings():
    # fbgemm-gpu announces the end of its module paths, which torchrec imports
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"fbgemm_gpu\.|torchrec\.")
    from torchrec.models.dlrm import DLRM, DLRM_DCN
    from torchrec.modules.embedding_configs import EmbeddingBagConfig
    from torchrec.modules.embedding_modules import EmbeddingBagCollection
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

ROWS = {"s0": 10, "s1": 11, "s2": 12, "s3": 13}
HISTORY_ROWS = 14
NUMBERS = 3
DIM = 4
ALL = (*ROWS, "h")


def under(prefix: str, names: tuple[str, ...]) -> frozenset[str]:
    """Return the parameter names of tables."""
    return frozenset(f"{prefix}.{name}" for name in names)


# -------------------------------------------------------------------------------------------------------- deepctr-torch

_FIELDS = [SparseFeat(name, rows, embedding_dim=DIM) for name, rows in ROWS.items()]
_HISTORY = VarLenSparseFeat(SparseFeat("h", HISTORY_ROWS, embedding_dim=DIM), maxlen=5, combiner="mean")
_COLUMNS = [*_FIELDS, *(DenseFeat(f"d{i}", 1) for i in range(NUMBERS)), _HISTORY]
_SMALL = {"task": "binary", "init_std": 0.3, "dnn_hidden_units": (8,)}
_SECOND_ORDER = under("embedding_dict", ALL)
_FIRST_ORDER = under("linear_model.embedding_dict", ALL)
_BOTH_ORDERS = _FIRST_ORDER | _SECOND_ORDER
# a table of each of a pair of fields
_PAIRS = frozenset(
    f"second_order_embedding_dict.{a}+{b}.emb{side}" for a, b in combinations(ROWS, 2) for side in (1, 2)
)


def deepctr_batch(samples: int, generator: torch.Generator) -> Batch:
    """Return one float matrix: ids of fields, numbers, a history padded with 0."""
    ids = [torch.randint(rows, (samples, 1), generator=generator) for rows in ROWS.values()]
    numbers = torch.rand(samples, NUMBERS, generator=generator)
    history = torch.randint(HISTORY_ROWS, (samples, 5), generator=generator)
    return (torch.cat([*ids, numbers, history], dim=1).float(),)


def _deepctr(
    name: str, tables: frozenset[str] = _BOTH_ORDERS, smallest: int = 0, graphs: int = 1, **options: Any
) -> Entry:
    def build() -> nn.Module:
        linear = () if name == "PNN" else (_COLUMNS,)
        deep = [*_FIELDS, _HISTORY] if name in ("AFM", "CCPM") else _COLUMNS
        kwargs = {key: value for key, value in {**_SMALL, **options}.items() if value is not None}
        model: nn.Module = getattr(deepctr, name)(*linear, deep, **kwargs)
        return model

    return Entry(f"deepctr.{name}", build, deepctr_batch, tables, smallest=smallest, graphs=graphs, exact=False)


DEEPCTR = (
    _deepctr("DeepFM"),
    _deepctr("DCN"),
    _deepctr("DCNMix", smallest=2, low_rank=2, num_experts=2),
    _deepctr("xDeepFM", graphs=2, cin_layer_size=(4, 4)),
    _deepctr("AutoInt"),
    _deepctr("WDL"),
    _deepctr("NFM"),
    _deepctr("PNN", _SECOND_ORDER),
    _deepctr("FiBiNET"),
    _deepctr("AFM", dnn_hidden_units=None),
    _deepctr("AFN", smallest=2, dnn_hidden_units=None, ltl_hidden_size=4, afn_dnn_hidden_units=(8,)),
    _deepctr("IFM"),
    _deepctr("DIFM", smallest=1),
    _deepctr("ONN", _FIRST_ORDER | _PAIRS),
    _deepctr("CCPM", smallest=1, graphs=2),
)

# --------------------------------------------------------------------------------------------------------- torch-rechub


def _fields() -> list[Any]:
    return [SparseFeature(name, rows, embed_dim=DIM) for name, rows in ROWS.items()]


def _numbers() -> list[Any]:
    return [DenseFeature(f"d{i}") for i in range(NUMBERS)]


def _history(pooling: str = "mean", shared_with: str | None = None) -> Any:
    return SequenceFeature("h", HISTORY_ROWS, embed_dim=DIM, pooling=pooling, shared_with=shared_with, padding_idx=0)


def _mlp() -> dict[str, Any]:
    return {"dims": [8], "dropout": 0.0, "activation": "relu"}


def rechub_batch(samples: int, generator: torch.Generator) -> Batch:
    """Return a dict: ids by field, numbers, a history of any length, a target item."""
    x = {f"d{i}": torch.rand(samples, generator=generator) for i in range(NUMBERS)}
    x |= {name: torch.randint(rows, (samples,), generator=generator) for name, rows in ROWS.items()}
    length = int(torch.randint(1, 7, (), generator=generator))
    x["h"] = torch.randint(HISTORY_ROWS, (samples, length), generator=generator)
    x["t"] = torch.randint(HISTORY_ROWS, (samples,), generator=generator)
    return (x,)


def _rechub(name: str, build: Callable[[], nn.Module], tables: tuple[str, ...], prefix: str, smallest: int) -> Entry:
    return Entry(f"rechub.{name}", build, rechub_batch, under(prefix, tables), smallest=smallest, exact=False)


def _rechub_din() -> nn.Module:
    mlp = {"dims": [8], "dropout": 0.0}
    target = SparseFeature("t", HISTORY_ROWS, embed_dim=DIM)
    model: nn.Module = rechub.DIN(_fields(), [_history("concat", "t")], [target], mlp, {"dims": [8]})
    return model


_EMBED = "embedding.embed_dict"
RECHUB = (
    _rechub("WideDeep", lambda: rechub.WideDeep(_numbers(), [*_fields(), _history()], _mlp()), ALL, _EMBED, 2),
    _rechub("DeepFM", lambda: rechub.DeepFM([*_numbers(), *_fields(), _history()], _fields(), _mlp()), ALL, _EMBED, 2),
    _rechub("DCN", lambda: rechub.DCN([*_numbers(), *_fields(), _history()], 2, _mlp()), ALL, _EMBED, 2),
    _rechub(
        "DCNv2", lambda: rechub.DCNv2([*_numbers(), *_fields(), _history()], 2, _mlp(), low_rank=2), ALL, _EMBED, 2
    ),
    _rechub(
        "AutoInt",
        lambda: rechub.AutoInt([*_fields(), _history()], _numbers(), mlp_params=_mlp()),
        ALL,
        "sparse_embedding.embed_dict",
        2,
    ),
    _rechub("EDCN", lambda: rechub.EDCN([*_fields(), _history()], 2, _mlp()), ALL, _EMBED, 2),
    _rechub("FiBiNet", lambda: rechub.FiBiNet(_fields(), _mlp()), tuple(ROWS), _EMBED, 2),
    _rechub("AFM", lambda: rechub.AFM([*_fields(), _history()], DIM, 4), ALL, _EMBED, 0),
    _rechub("DIN", _rechub_din, (*ROWS, "t"), _EMBED, 2),
)

# ------------------------------------------------------------------------------------------------------------- TorchRec


def torchrec_batch(samples: int, generator: torch.Generator) -> Batch:
    """Return numbers and a jagged tensor with bags of 0 to 3 ids for each field."""
    lengths = torch.randint(4, (len(ROWS), samples), generator=generator)
    ids = [
        torch.randint(rows, (int(count),), generator=generator)
        for rows, count in zip(ROWS.values(), lengths.sum(1), strict=True)
    ]
    jagged = KeyedJaggedTensor.from_lengths_sync(list(ROWS), torch.cat(ids), lengths.reshape(-1))
    return torch.randn(samples, NUMBERS, generator=generator), jagged


def _collection() -> EmbeddingBagCollection:
    configs = [
        EmbeddingBagConfig(name=f"t_{name}", embedding_dim=DIM, num_embeddings=rows, feature_names=[name])
        for name, rows in ROWS.items()
    ]
    return EmbeddingBagCollection(tables=configs, device=torch.device("cpu"))


def _torchrec(name: str, model: Callable[..., nn.Module], **options: Any) -> Entry:
    sizes: Mapping[str, Any] = {
        "dense_in_features": NUMBERS,
        "dense_arch_layer_sizes": [8, DIM],
        "over_arch_layer_sizes": [8, 1],
    }
    tables = under("sparse_arch.embedding_bag_collection.embedding_bags", tuple(f"t_{name}" for name in ROWS))
    return Entry(
        f"torchrec.{name}", lambda: model(_collection(), **sizes, **options), torchrec_batch, tables, smallest=1
    )


TORCHREC = (_torchrec("DLRM", DLRM), _torchrec("DLRM_DCN", DLRM_DCN, dcn_num_layers=2, dcn_low_rank_dim=2))

LIBRARIES: tuple[Entry, ...] = (*DEEPCTR, *RECHUB, *TORCHREC)
