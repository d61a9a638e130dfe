"""Writes docs/gallery/: a page for each named rule and each preset. ``python docs/gallery.py``; ``--check`` only compares the text.

Words come from docstrings, figures from the tables of the other pages, pictures from ``docs/gallery_pictures.py``, which runs what it draws
(``--pictures`` draws them again; it needs matplotlib).
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import wrap
from typing import Any

import normwise as nw
from normwise.policy import Policy
from normwise.policy.named import NAMED, Common

DOCS = Path(__file__).resolve().parent
GALLERY = DOCS / "gallery"
PRESETS: dict[str, Any] = {**nw.optim.PRESETS, "auto": nw.optim.auto}

EXAMPLES: dict[str, dict[str, Any]] = {
    "agc": {}, "autoclip": {}, "clip_grad_norm": {"max_norm": 1.0}, "clip_grad_value": {"value": 0.5}, "clip_weight_norm": {"radius": 4.0},
    "clip_weight_value": {"value": 0.5}, "cpr": {}, "decay_to_init": {"strength": 0.1}, "elastic_net": {"l1": 1e-5, "l2": 1e-4},
    "group_lasso": {"strength": 0.02}, "hyperball": {}, "l1_ball": {"radius": 2.0}, "l1_penalty": {"strength": 1e-5},
    "l1_prox": {"strength": 0.001}, "l2_penalty": {"strength": 1e-4}, "max_norm": {"radius": 3.0}, "min_max_norm": {"min": 0.5, "max": 2.0},
    "non_negative": {}, "normalize_grad": {}, "nuclear_prox": {"strength": 0.01}, "orthogonal": {},
    "orthogonal_penalty": {"strength": 0.01}, "qk_clip": {},
    "radial_brake": {}, "relative_update": {}, "spectral_cap": {"radius": 2.0}, "spectral_normalize": {}, "unit_norm": {},
    "weight_decay": {"strength": 0.01}, "zclip": {},
}  # fmt: skip
"""The example of each rule: numbers that are usual, nothing that has a default."""

FAMILIES = {
    "Bounds on weights": ("max_norm", "unit_norm", "min_max_norm", "clip_weight_norm", "clip_weight_value", "non_negative", "l1_ball"),
    "Singular values": ("spectral_cap", "spectral_normalize", "orthogonal", "orthogonal_penalty", "nuclear_prox"),
    "Penalties and decay": ("l2_penalty", "l1_penalty", "elastic_net", "weight_decay", "decay_to_init", "cpr"),
    "Exact zeros": ("l1_prox", "group_lasso"),
    "Gradients": ("clip_grad_norm", "clip_grad_value", "normalize_grad", "agc", "autoclip", "zclip"),
    "Steps": ("relative_update", "hyperball", "radial_brake"),
    "Attention": ("qk_clip",),
}
COMPARED = {
    "l2_penalty": "L2 penalty", "l1_penalty": "L1 penalty", "clip_weight_value": "clip by value", "clip_weight_norm": "clip by tensor norm",
    "unit_norm": "normalise units", "max_norm": "max-norm", "spectral_cap": "spectral cap", "l1_prox": "soft threshold",
    "weight_decay": "decoupled decay",
}  # fmt: skip
"""What a rule is called in the tables of compare.md,"""
BALANCED = {"clip_weight_value": "weight clipping", "spectral_cap": "spectral cap", "spectral_normalize": "spectral normalisation"}
"""of the GAN in results.md,"""
IN_RECIPES = {
    "plasticity": {"l2_penalty": "L2-init", "weight_decay": "shrink", "clip_weight_value": "weight clipping",
                   "unit_norm": "normalise and project", "spectral_cap": "spectral cap"},
    "spikes": {"clip_grad_norm": "clipping", "autoclip": "AutoClip", "zclip": "ZClip", "qk_clip": "QK-clip"},
    "quantise": {"weight_decay": "weight decay", "clip_weight_value": "clip by value", "max_norm": "max-norm",
                 "spectral_cap": "spectral cap"},
    "finetune": {"l2_penalty": "L2-SP", "decay_to_init": "decay to init", "max_norm": "ball", "relative_update": "relative steps"},
}  # fmt: skip
"""and of the recipes in recipes.md."""
QUESTIONS = {
    "plasticity": ("Labels that change, accuracy in the last ten of sixty shuffles", "nothing", "without", "plasticity"),
    "spikes": ("One batch in twenty is bad, test loss", "nothing", "without", "bad-batches"),
    "quantise": ("MNIST with weights of four bits, test accuracy", "nothing", "without", "four-bits"),
    "finetune": ("Fine-tuning with at most 0.05 forgotten, loss on the second text", "full", "plain", "fine-tuning"),
}
MEASURED = {"clip_weight_value": "value", "max_norm": "max_norm", "clip_grad_norm": "clip", "spectral_cap": "cap"}
"""Rules of their own rows in benchmarks.md."""
BENCHED = ("MLP 2 × 64²", "the article's CNN", "GPT-2 of 4.8M, transformers")


# --------------------------------------------------------------------------------------------------- committed tables


def rows(page: str, marker: str, which: int = 0) -> list[dict[str, str]]:
    """A table of a page between ``<!-- marker -->`` and its end, by column; none where it has not been measured."""
    part = (DOCS / page).read_text(encoding="utf-8").partition(f"<!-- {marker} -->\n")[2].partition(f"<!-- end {marker} -->")[0]
    tables = re.findall(r"(?:^\|.*\n)+", part, re.MULTILINE)
    if which >= len(tables):
        return []
    head, _, *body = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in tables[which].splitlines()]
    return [dict(zip(head, cells, strict=True)) for cells in body]


def table(found: list[dict[str, str]]) -> str:
    lines = [f"| {' | '.join(line)} |" for line in [list(found[0]), ["---"] * len(found[0]), *(row.values() for row in found)]]
    return "\n".join(lines)


def compared(name: str) -> str:
    """The rule beside nothing, of the article's network."""
    found = []
    for data, marker in (("digits", "digits in full"), ("MNIST", "mnist in full")):
        cells = {(row["optimizer"], row["strategy"]): row for row in rows("compare.md", marker)}
        for optimizer in dict.fromkeys(of for of, _ in cells):
            own, base = cells.get((optimizer, COMPARED[name])), cells[optimizer, "nothing"]
            if own:
                accuracy = "test accuracy, %"
                found.append({"data": data, "optimizer": optimizer, "with it": own[accuracy], "with nothing": base[accuracy],
                              "strength": own["strength"], "share of a step": own["control's share"]})  # fmt: skip
    said = "each cell tuned alike; test accuracy in %, mean ± deviation of 3 seeds, and what lies within that is no difference"
    return f"[The article's CNN](../compare.md), {said}:\n\n{table(found)}"


def balanced(name: str) -> str:
    cells = {(row["loss"], row["strategy"]): row for row in rows("results.md", "gan")}
    figure = "Fréchet, equal steps"
    found = [{"loss": loss, "with it": cells[loss, BALANCED[name]][figure], "with nothing": cells[loss, "nothing"][figure]}
             for loss in dict.fromkeys(of for of, _ in cells)]  # fmt: skip
    said = "Fréchet distance at equal steps, lower is better; median, lowest to highest"
    return f"[A GAN's discriminator](../gan.md#results), {said}:\n\n{table(found)}"


def in_recipe(recipe: str, name: str) -> str:
    question, nothing, called, anchor = QUESTIONS[recipe]
    found = rows("recipes.md", f"recipe {recipe}")
    figure = list(found[0])[1]
    of = {row["arm"]: row for row in found}
    own, base = of[IN_RECIPES[recipe][name]], of[nothing]
    said = f"{own[figure]} with it ({own['chosen']}), {base[figure]} {called}; median, lowest to highest"
    return f"[{question}](../recipes.md#{anchor}): {said}."


def helped(name: str) -> list[str]:
    """What the studies say of a rule."""
    found = [in_recipe(recipe, name) for recipe, arms in IN_RECIPES.items() if name in arms]
    found += [compared(name)] if name in COMPARED else []
    found += [balanced(name)] if name in BALANCED else []
    if name == "group_lasso":
        found.append("[From zero units to a smaller network](../pruning.md), on digits, MNIST and CIFAR-10.")
    return found or ["No study here has measured what it gains."]


def cost(name: str) -> str:
    """What a rule adds to a step."""
    if name == "group_lasso":
        times = re.findall(r"A step under the lasso takes ([\d.]+) times", (DOCS / "pruning.md").read_text(encoding="utf-8"))
        return f"A step takes {min(times)} to {max(times)} times one without it, in [five studies](../pruning.md); most on the smallest."
    if name == "hyperball":
        [row] = [row for row in rows("benchmarks.md", "bench trainer") if row["rules"] == name]
        share = f"{float(row['share']):.0%} of a step of a GPT-2 of 4.8M in a Trainer ([measured](../benchmarks.md))"
        return f"{share}. Within `nw.optim` it needs no copy of the weights."
    if name not in MEASURED:
        other = "Not measured separately. `normwise bench control` measures bounds and clips, [the figures](../benchmarks.md)."
        return "Its share of a step of the article's CNN is in the table above." if name in COMPARED else other
    text = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    found = []
    for network in BENCHED:
        part = re.search(rf"\*\*{re.escape(network)}, in µs; a training step takes (\d+)\*\*\n\n((?:\|.*\n)+)", text)
        for line in part[2].splitlines()[2:] if part else ():
            rule, state, added, hand, _, share, *_ = (cell.strip() for cell in line.split("|")[1:-1])
            if rule == MEASURED[name] and state in ("nothing", "all"):
                found.append({"network": network, "blocks changed": state, "added, µs": added, "by hand, µs": hand, "of a step": share})
    page = "../benchmarks.md#normwise-bench-control-what-a-control-adds-to-a-step"
    return f"On one CPU thread, fp32 ([all cells]({page})):\n\n{table(found)}"


def raced(label: str) -> str:
    """A contender in the four races."""
    shares, again = {row["contender"]: row for row in rows("results.md", "race")}, second(label)
    if label not in shares:
        return again or "Not included in the races."
    found = []
    for task in ("cnn", "resnet", "lstm", "gpt"):
        of = {row["contender"]: row for row in rows("results.md", f"race {task}")}
        samples, _, seconds = shares[label][task].partition(" / ")
        found.append({"task": task, "share of samples": samples, "of seconds": seconds or "-", "step, ms": of[label]["step, ms"],
                      "AdamW's step, ms": of["AdamW"]["step, ms"]})  # fmt: skip
    return (
        "How much of the training of the tuned baseline it needs for the baseline's result ([the races](../results.md); below 1 is sooner; "
        f"the baseline is AdamW, on `resnet` SGD). Steps are of the batch that each chose:\n\n{table(found)}\n\n{again}"
    ).rstrip()


def second(label: str) -> str:
    """The same of protocol 2, under which what is not tuned has a label of its own; empty where it has not raced."""
    by_task = rows("race-results.md", "race 2", 1)
    own = next((name for name in (f"{label}, untuned", label) if by_task and name in by_task[0]), "")
    found = [{"task": row["task"], "samples / seconds": row[own]} for row in by_task if own and row[own] != "-"]
    if not found:
        return ""
    how = "with nothing tuned" if own != label or label == "auto" else "tuned"
    return (
        "[The second race](../race-results.md), whose AdamW has a rate for each role and more trials than anybody; here "
        f"{how}, its share of AdamW's samples / seconds:\n\n{table(found)}"
    )


# -------------------------------------------------------------------------------------------------------------- pages


def as_markdown(text: str, named: Callable[[re.Match[str]], str] = lambda m: f"`{m[1]}`") -> str:
    """A docstring without roles (``named`` writes what they point at) and double backticks, its examples as blocks of code."""
    plain = re.sub(r":\w+:`~?([^`]+)`", named, text).replace("``", "`")
    code = re.compile(r"(?:^ *>>> .*\n?(?:^ *(?!>>>)\S.*\n?)*)+", re.MULTILINE)    # with what is printed
    return code.sub(lambda m: "\n```python\n" + re.sub(r"(?m)^ *>>> ", "", m[0]).rstrip() + "\n```\n", plain)


def with_links(text: str, own: str) -> str:
    """A docstring as Markdown, its references as links to pages of the gallery."""

    def linked(match: re.Match[str]) -> str:
        name = match[1].rpartition(".")[2]
        page = name if name in NAMED else name.lower() if name in PRESETS else ""
        return f"[`{name}`]({page}.md)" if page and name != own else f"`{match[1].removeprefix('normwise.')}`"

    return re.sub(r"(?<![\w/`])docs/([\w-]+)\.md", r"[\1](../\1.md)", as_markdown(text, linked))


def sections(text: str, own: str) -> tuple[str, str, dict[str, str]]:
    """The first sentence of a docstring, the rest, and its arguments."""
    head, _, about = text.partition("\nArgs:\n")
    first, _, body = head.strip().partition("\n\n")
    given = re.finditer(r"^    ([\w, ]+): (.+(?:\n {8}.+)*)", about.partition("\nRaises:")[0], re.MULTILINE)
    arguments = {m[1]: " ".join(m[2].split()) for m in given}
    return with_links(" ".join(first.split()), own), with_links(body.partition("\nRaises:")[0].strip(), own).strip(), arguments


def listed(arguments: dict[str, str], own: str) -> str:
    return "\n".join(f"- `{name}`: {with_links(about, own)}" for name, about in arguments.items())


def signature(call: str, made: Any) -> str:
    """As it is called, without types."""
    found = inspect.signature(made)
    shown = [p.replace(annotation=p.empty) for p in found.parameters.values() if p.kind is not p.VAR_KEYWORD]
    whole = f"{call}{found.replace(parameters=shown, return_annotation=found.empty)}"
    return "\n".join(wrap(whole, 88, subsequent_indent="    ", break_long_words=False))


def rule_page(name: str) -> str:
    """The page of a named rule."""
    make, example = NAMED[name], EXAMPLES[name]
    first, body, arguments = sections(inspect.getdoc(make) or "", name)
    written = ", ".join(map(repr, example.values()))
    in_yaml = f"- {name}: {{{', '.join(f'{argument}: {value}' for argument, value in example.items())}}}" if example else f"- {name}"
    common = ", ".join(f"`{key}`" for key in Common.__annotations__)
    parts = [
        f"# `{name}`", first, caption(name),
        f"```python\ncontrol = nw.attach(model, optimizer, nw.{name}({written}))\n```\n```yaml\n{in_yaml}\n```",
        body, "## Arguments", f"```\n{signature(f'nw.{name}', make)}\n```", listed(arguments, name),
        f"And the keywords of [every rule](../policies.md#fields): {common}.",
        "## When it helps", *helped(name), "## What it costs", cost(name),
        "## The same by its fields", f"```yaml\n{Policy(make(**example)).to_yaml().strip()}\n```",
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def preset_page(name: str) -> str:
    """The page of a preset."""
    made = PRESETS[name]
    first, body, arguments = sections(inspect.getdoc(made) or "", name)
    common = [argument for argument in arguments if argument in ("override", "policy", "layouts", "maximize", "rounding", "seed")]
    text = (DOCS / "optimizers.md").read_text(encoding="utf-8")
    kinds = re.findall(rf"^\| `{name}` \| `(\w+)` \| (.+?) \| (.+?) \|$", text, re.MULTILINE)
    taken = table([{"roles": roles, "row": f"`{row}`", "columns": columns} for row, roles, columns in kinds]) if kinds else ""
    state = {row["preset"]: row["state_bytes_per_parameter"] for row in rows("optimizers.md", "bench step", 1)}
    of_ridge = "Steps and state are those of [`Ridge`](ridge.md)."    # auto
    kept = f"State: {state[name]} bytes a parameter, on a GPT of 4.8M." if name in state else of_ridge
    parts = [
        f"# `{name}`", first, caption(name.lower()),
        f"```python\noptimizer = nw.optim.{name}(model)\nprint(optimizer.routing)    # which parameter takes which step\n```",
        f"In a configuration file: `_target_: normwise.optim.{name}` (Hydra), `class_path: normwise.optim.{name}` (LightningCLI).",
        body, "## Which role takes which step" if taken else "", taken,
        "The columns are explained under [Optimizers](../optimizers.md#a-step)." if taken else "",
        "## When it helps", raced(name), "## What it costs", f"{kept} [Steps beside torch's](../optimizers.md#the-contract).",
        "## Arguments", f"```\n{signature(f'nw.optim.{name}', made)}\n```",
        listed({argument: about for argument, about in arguments.items() if argument not in common}, name),
        f"And those of every preset: {', '.join(f'`{argument}`' for argument in common)}.",
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def caption(name: str) -> str:
    from gallery_pictures import CAPTIONS, SERIES, STEPS  # beside this file

    about = CAPTIONS.get(name) or SERIES.get(name) or STEPS
    return f"![What it does](images/{name}.png)\n\n*{about}*"


def index() -> str:
    """Everything, by family."""
    about = (
        "One page for each named rule and each optimizer: what it does, drawn by running it; when it helped, by our own measurements; what "
        "it costs; its arguments and its source."
    )
    parts = ["# Gallery", about]
    kinds = {**{family: {name: NAMED[name] for name in names} for family, names in FAMILIES.items()}, "Optimizers": PRESETS}
    for family, members in kinds.items():
        lines = []
        for name, made in members.items():
            first = sections(inspect.getdoc(made) or "", name)[0]
            picture = f'<img src="images/{name.lower()}.png" width="140" loading="lazy" alt="">'
            about = first.replace("|", "\\|")
            lines.append({"name": f"[`{name}`]({name.lower()}.md)<br>[{picture}]({name.lower()}.md)", "what it does": about})
        parts += [f"## {family}", table(lines)]
    return "\n\n".join(parts) + "\n"


def pages() -> dict[str, str]:
    """Every page by its file's name."""
    return {
        "index.md": index(), **{f"{name}.md": rule_page(name) for name in sorted(NAMED)},
        **{f"{name.lower()}.md": preset_page(name) for name in PRESETS},
    }  # fmt: skip


def main() -> int:
    made = pages()
    stale = [name for name, text in made.items() if not (GALLERY / name).exists() or (GALLERY / name).read_text(encoding="utf-8") != text]
    gone = [path.name for path in GALLERY.glob("*.md") if path.name not in made]
    if "--check" in sys.argv:
        print("\n".join(f"docs/gallery/{name} is not what docs/gallery.py writes" for name in stale + gone))
        return 1 if stale or gone else 0
    GALLERY.mkdir(exist_ok=True)
    for name in stale:
        (GALLERY / name).write_text(made[name], encoding="utf-8")
    for name in gone:
        (GALLERY / name).unlink()
    if "--pictures" in sys.argv:
        from gallery_pictures import draw

        draw(GALLERY / "images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
