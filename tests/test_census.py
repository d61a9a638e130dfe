"""Published architectures, built small and offline: what normwise makes of them, against expectations that were written by hand.

The expectations stand in `census`; the forward pass is asked whether they are right, independent of normwise.
"""

from __future__ import annotations

import functools
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from census.all import DEFAULT, FAMILIES, architectures, timm_is_missing
from census.axes import canonical, matrices
from census.compare import faults
from census.family import Family, Unavailable
from census.oracle import gives_output, input_axis, output_axis, part_rows
from census.plain import Causal, Patches
from census.seen import Seen, look

sys.path.insert(0, str(Path(__file__).parent.parent / "docs"))
import advise_page
import census_page

KINDS = {f.group for f in FAMILIES}


def _built(family: Family) -> nn.Module:
    try:
        return family.build()
    except Unavailable as why:
        pytest.skip(str(why))


@functools.cache
def _looked_at(family: str) -> tuple[nn.Module, Seen]:
    """A model of the default ones, by name, and what normwise says of it: it is built once."""
    model = _built(next(f for f in DEFAULT if f.name == family))
    return model, look(model)


def _id(family: Family) -> str:
    return family.name


def test_it_holds_what_it_should() -> None:
    """A census that finds nothing would pass."""
    assert len(architectures(f for f in FAMILIES if f.group not in ("torch.nn", "plain torch"))) >= 150
    assert {f.group for f in DEFAULT} == KINDS
    assert len({f.name for f in FAMILIES}) == len(FAMILIES)


@pytest.mark.parametrize("family", DEFAULT, ids=_id)
def test_a_few_of_every_kind(family: Family) -> None:
    assert faults(family, *_looked_at(family.name)) == []


@pytest.mark.long
@pytest.mark.parametrize("family", [f for f in FAMILIES if not f.default], ids=_id)
def test_all_of_them(family: Family, coverage: Any) -> None:
    assert faults(family, _built(family)) == []
    coverage("census", family.group, "models")


@pytest.mark.long
def test_most_of_them_can_be_built() -> None:
    """At least 60 architectures of transformers are compared in fact."""
    pytest.importorskip("transformers")
    built = []
    for family in FAMILIES:
        try:
            family.build()
            built.append(family)
        except Unavailable:
            continue
    assert len(architectures(f for f in built if f.group not in ("torch.nn", "plain torch"))) >= 150


def test_timm() -> None:
    if why := timm_is_missing():
        pytest.skip(why)
    pytest.fail("timm can be imported: its models belong in the census")


# ------------------------------------------------------------------------------------------ are the expectations right?


def test_the_pattern_language() -> None:
    assert [m.tolist() for m in matrices((4, 2), "(h m o) i", {"h": 2, "m": (1, 1)})] == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    assert [m.tolist() for m in matrices((2, 3), "i (m o)", {"m": (2, 1)})] == [[[0, 3], [1, 4]], [[2, 5]]]
    assert [m.tolist() for m in matrices((2, 1, 2), "e i o", {})] == [[[0], [1]], [[2], [3]]]
    assert canonical(matrices((4, 1), "(s o) i", {"s": 2})) != canonical(matrices((4, 1), "(o s) i", {"s": 2}))


def _words(model: Any, length: int) -> Tensor:
    output = model(input_ids=torch.arange(5, 5 + length)[None])
    return output.logits if "logits" in output else output[0]


ASKED = [f for f in FAMILIES if f.group in ("decoders", "encoders") and "qkv" in f.attention and f.inputs is not None]
QUICK = ("gpt2", "falcon, groups", "codegen", "gpt_neox")


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f.name in QUICK else pytest.mark.long, id=f.name) for f in ASKED])
def test_the_forward_pass_has_the_same_queries_keys_and_values(family: Family) -> None:
    model = _built(family)
    glob = family.attention["qkv"][0]
    name = [n for n, _ in model.named_parameters() if fnmatchcase(n, glob)][-1].removesuffix(".weight")
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    pattern = family.table[glob][1]
    stated = {}
    for part, matrix in zip(family.sizes.get("parts", ("q", "k", "v")), matrices(weight.shape, pattern, family.sizes), strict=True):
        outputs = matrix % weight.shape[1] if pattern.startswith("i") else matrix // weight.shape[1]
        stated[part] = sorted({int(row) for row in outputs.flatten()})
    assert part_rows(model, name, _words) == stated


@pytest.mark.parametrize(("module", "name"), [(Causal(), "c_attn"), (Patches(), "qkv")], ids=["nanoGPT", "timm's ViT"])
def test_so_has_that_of_plain_attentions(module: nn.Module, name: str) -> None:
    x = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = part_rows(module, name, lambda model, length: model(x[:, :length]))
    assert found == {"q": list(range(16)), "k": list(range(16, 32)), "v": list(range(32, 48))}


APART = [f for f in FAMILIES if f.group in ("decoders", "encoders") and "q" in f.attention and f.inputs is not None]
UNASKABLE = {
    "albert": "uses its one layer several times",
    "bert, choices": "takes several texts",
    "canine, answers": "pools the positions",
    "convbert": "convolves beside it",
    "diffllama": "subtracts one attention from another",
    "funnel": "pools the positions",
    "layoutlmv3, answers": "needs boxes",
    "longformer": "pads to its window",
    "luke, classes of entities": "needs entities",
    "lxmert, answers": "needs an image",
    "mra": "approximates the softmax",
    "nanochat": "adds value embeddings",
    "nystromformer": "approximates the softmax",
    "perceiver": "attends from its own latents",
    "reformer": "has no attention of one position",
    "splinter, answers": "looks for a question token",
    "squeezebert": "is made of convolutions",
    "tapas, answers": "averages its scores over the cells of a table",
    "visual_bert, answers": "needs an image",
    "xglm": "masks with a number that is for float32 alone",
    "xmod": "needs a language",
    "xlnet": "attends to what comes after, too, by a position of its own",
    "xlnet, answers": "attends to what comes after, too, by a position of its own",
    "yoso": "has no softmax",
}


@pytest.mark.long
@pytest.mark.parametrize("family", [f for f in APART if f.name not in UNASKABLE], ids=_id)
def test_and_those_that_are_kept_apart(family: Family) -> None:
    model = _built(family)
    if _words(model, 5).shape[1] != 5:
        pytest.skip("it gives one output a text")
    for part in ("q", "k", "v"):
        name = [n for n, _ in model.named_parameters() if fnmatchcase(n, family.attention[part][0])][-1].removesuffix(".weight")
        found = part_rows(model, name, _words)
        assert found[part]
        assert not any(rows for other, rows in found.items() if other != part), f"{name}: {found}"


EXPERTS = [f for f in FAMILIES if any(glob.endswith("gate_up_proj") for glob in f.table)]


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f.default else pytest.mark.long, id=f.name) for f in EXPERTS])
def test_the_forward_pass_has_the_same_axes_of_experts(family: Family) -> None:
    model = _built(family)
    module: Any = next(m for m in model.modules() if isinstance(getattr(m, "gate_up_proj", None), nn.Parameter))
    up, down = (
        next(s for glob, s in family.table.items() if glob.endswith(end))[1].partition("|")[0].split()
        for end in ("gate_up_proj", "down_proj")
    )
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    width = module.gate_up_proj.shape[up.index("i")]
    x = torch.randn(module.gate_up_proj.shape[0], width)  # one token an expert, for those that want them sorted

    def run(tokens: Tensor) -> Tensor:
        if type(module).__name__ == "Llama4TextExperts":
            return module(tokens)
        return module(tokens, torch.arange(len(tokens))[:, None], torch.ones(len(tokens), 1))

    assert input_axis(module.gate_up_proj, run, x) == up.index("i")
    assert output_axis(module.down_proj, run, x) == down.index("o")


CHANGED = {"nanochat": "tanh", "swiftformer": "the mean of its two heads"}
"""What comes after the head, so that its numbers are not the output's."""
HEADED = [f for f in FAMILIES if f.heads and f.inputs is not None and f.name not in CHANGED]


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f.default else pytest.mark.long, id=f.name) for f in HEADED])
def test_the_heads_give_the_output(family: Family) -> None:
    model = _built(family)
    names = [n.removesuffix(".weight") for n, _ in model.named_parameters() if any(fnmatchcase(n, glob) for glob in family.heads)]
    assert family.inputs is not None
    try:
        given = gives_output(model, names, family.inputs(model))
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        if family.default:
            raise
        pytest.skip(f"it needs other inputs: {error}")
    assert given


# --------------------------------------------------------------------------------------------------------------- the page


def test_the_page_says_what_the_code_says() -> None:
    pytest.importorskip("transformers")
    page = census_page.PAGE.read_text()
    missing = [family.name for family in DEFAULT if census_page.row(family, *_looked_at(family.name)) not in page]
    assert missing == [], "run docs/census_page.py"


@pytest.mark.long
@pytest.mark.parametrize("page", [census_page, advise_page])
def test_all_of_the_page(page: Any) -> None:
    pytest.importorskip("transformers")
    assert page.PAGE.read_text() == page.text(), f"run docs/{page.__name__}.py"
