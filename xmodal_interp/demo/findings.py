"""Findings of the demo as sentences, each with its number and a baseline."""

from __future__ import annotations

import pandas as pd

Tables = dict[str, pd.DataFrame]


def telling(tables: Tables, n_scenes: int) -> list[str]:
    """Return one line per finding of the tables; ``n_scenes`` is the number of scenes."""
    return [
        _answers(tables["accuracy"], n_scenes),
        _pointing(tables),
        *_ratio(tables["ratio"]),
        *_heads(tables["pruning"]),
        _curve(tables["pruning_curve"]),
    ]


def _answers(table: pd.DataFrame, n_scenes: int) -> str:
    parts = [f"{row.question_kind} {row.accuracy:.1%} of {row.n}" for row in table.itertuples()]
    return f"Right answers on {n_scenes} held-out scenes: {', '.join(parts)}."


def _pointing(tables: Tables) -> str:
    best, random = tables["best_head"].iloc[0], tables["best_head_untrained"].iloc[0]
    heads = tables["pointing"].set_index(["layer", "head"])
    other = heads.loc[(best["layer"], best["head"]), "other_object"]
    return (
        f"In colour questions, the peak of layer {best['layer']} head {best['head']} is on the "
        f"object asked about in {best['hit']:.1%} of the scenes ({best['hit_low']:.1%} to "
        f"{best['hit_high']:.1%}), and on a given other object in {other:.1%}. "
        f"Best head of the untrained model: {random['hit']:.1%}; random place: "
        f"{heads['hit_chance'].mean():.1%}. (The head was chosen on one half of the scenes and "
        f"scored on the other, n = {best['n']}.)"
    )


def _ratio(table: pd.DataFrame) -> list[str]:
    null = table["null"].mean()
    ratios = ", ".join(f"{value:.2f}" for value in table["ratio"])
    below = table.loc[table["lift"] < 1, "layer"].tolist()
    lines = [
        f"Share of the last token's attention on the image, by layer: {ratios}; with uniform "
        f"attention: {null:.2f}."
    ]
    if below:
        named = f"Layer {below[0]} has" if len(below) == 1 else f"Layers {_listed(below)} have"
        lines.append(f"{named} less attention on the image than uniform attention.")
    return lines


def _listed(layers: list[int]) -> str:
    """Return layers as text, such as ``"0, 1 and 3"``."""
    return " and ".join([", ".join(map(str, layers[:-1])), str(layers[-1])])


def _heads(table: pd.DataFrame) -> list[str]:
    """Return a line per ``question_kind``: the heads with a loss whose interval excludes 0."""
    lines = []
    for kind, rows in table[table["question_kind"] != "all"].groupby("question_kind", sort=False):
        sure = rows[rows["accuracy_drop_low"] > 0].nlargest(3, "accuracy_drop")
        if sure.empty:
            lines.append(f"No single head is required for {kind} questions.")
            continue
        columns = ["layer", "head", "accuracy_drop", "accuracy_drop_low", "accuracy_drop_high"]
        named = [
            f"layer {layer:.0f} head {head:.0f} ({100 * drop:.0f} points, {100 * low:.0f} to "
            f"{100 * high:.0f})"
            for layer, head, drop, low, high in sure[columns].to_numpy(float)
        ]
        lines.append(
            "Accuracy lost when a head's attention is made uniform, "
            f"{kind} questions: {'; '.join(named)}."
        )
    return lines


def _curve(table: pd.DataFrame) -> str:
    summary = pd.DataFrame(table.attrs["summary"])
    shares = summary.groupby("order", sort=False)["share_at_95"].mean()
    parts = [f"{100 * share:.0f}% in {order} order" for order, share in shares.items()]
    return (
        "Share of heads that can be removed before accuracy falls below 95% of its initial value: "
        f"{', '.join(parts)}."
    )
