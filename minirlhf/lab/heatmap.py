"""A token heat map: every word of some answers on its own value, as HTML that runs no script.

Colour says sign and size (blue above 0, orange below), and so do a glyph and a line under the
word, for those who see no colour or print in grey. The value is read by hovering, by tabbing to
the word, or in a table. Texts of a batch are data: they are escaped, and characters that nobody
sees or that turn the reading order round are shown by their code.

The map brings its own white ground and dark ink, so it reads alike in a light and a dark theme.
Left out: sorting and choosing answers (panels/batch_table.py), anything that needs JavaScript.

Sources: Wong (2011, "Points of view: Color blindness", Nature Methods 8) for the palette; WCAG
2.2, success criteria 1.4.1 (use of colour), 1.4.3 (contrast) and 2.1.1 (keyboard).
"""

import html
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minirlhf.autopsy.convention import Convention, demand_fields
from minirlhf.autopsy.parts import AdvantageParts
from minirlhf.autopsy.pushes import surrogate_slope
from minirlhf.config import PPOConfig
from minirlhf.rollout import Rollout
from minirlhf.text import EOS

TOKENS = 400  # in one map; some 300 kB in the browser, whatever the words are
ANSWERS = 16
WIDTH = 24  # characters shown of one word
HALF = 0.5  # probability of stopping from which the reference "would have stopped"
LEVELS = 8  # shades of either sign
ENDS = {"p": (86, 180, 233), "n": (230, 159, 0)}  # sky blue, orange: one lightness, so that grey
# shows size alone and the glyphs the sign
STYLE = """.minirlhf-heat{position:relative;background:#fff;color:#222;color-scheme:light;
font:14px/1.5 sans-serif;padding:6px 8px 30px;direction:ltr;text-align:left;
print-color-adjust:exact;-webkit-print-color-adjust:exact}
.minirlhf-heat *{print-color-adjust:exact;-webkit-print-color-adjust:exact}
.minirlhf-heat p{margin:2px 0;color:#222}
.minirlhf-heat p>bdi{display:inline-block;color:#111;padding:0 3px;margin:1px 0;
border-bottom:3px solid transparent;border-radius:2px}
.minirlhf-heat .p{border-bottom:3px solid #0072B2}
.minirlhf-heat .n{border-bottom:3px dotted #8A3D00}
.minirlhf-heat .p::before{content:"+";font-size:.8em;vertical-align:.3em}
.minirlhf-heat .n::before{content:"\\2212";font-size:.8em;vertical-align:.3em}
.minirlhf-heat p>bdi:focus{outline:3px solid #111;outline-offset:1px}
.minirlhf-heat p>[aria-label]:focus::after,.minirlhf-heat p>[aria-label]:hover::after{
content:attr(aria-label);position:absolute;left:8px;right:8px;bottom:3px;height:22px;background:#fff;color:#111;
font-weight:bold;white-space:nowrap;overflow:hidden;text-overflow:ellipsis;z-index:1}
.minirlhf-heat p>[aria-label]:hover::after{z-index:2}
.minirlhf-heat i{color:#111;font-style:normal;font-weight:bold;padding:0 1px}
.minirlhf-heat .say{position:absolute;left:8px;bottom:3px;color:#595959}
.minirlhf-heat.box{max-height:260px;overflow:auto;padding:4px 8px}
.minirlhf-heat.more{padding:2px 8px}
.minirlhf-heat table{border-collapse:collapse;font-variant-numeric:tabular-nums}
.minirlhf-heat table tbody tr td,.minirlhf-heat table tr th{background:#fff;color:#222;
padding:0 8px;border-bottom:1px solid #ccc;text-align:right;font-size:13px}
.minirlhf-heat table tr th{text-align:left;vertical-align:bottom}
.minirlhf-heat table thead tr th{position:sticky;top:0}
.minirlhf-heat table tr .word{padding-left:20px;font-weight:normal}
@media print{.minirlhf-heat .say{display:none}.minirlhf-heat.box{max-height:none}}
"""


SAY = '<span class="say">Point at a word, or tab to it, to read its value here.</span>'
CLOSED = '<details class="minirlhf-heat more"><summary>The values as a table</summary>{}</details>'


def shade(sign: str, level: int) -> str:
    """Background of a word: `sign` "p" or "n", level 0 (white) to LEVELS (full colour)."""
    mixed = (round(255 + (end - 255) * level / LEVELS) for end in ENDS[sign])
    return f"#{''.join(f'{c:02x}' for c in mixed)}"


STYLE += "\n".join(
    f".minirlhf-heat .{sign}{level}{{background:{shade(sign, level)}}}"
    for sign in ENDS
    for level in range(LEVELS + 1)
)


def visible(text: str, width: int = WIDTH) -> str:
    r"""`text` with every character that cannot be seen, or that changes the order of reading, as
    its code (\u202e), cut to `width` characters; not yet escaped for HTML."""
    cut = text if len(text) <= width else text[: width - 1] + "…"
    if cut.isascii() and cut.isprintable():
        return cut if cut.strip() else repr(cut)
    seen = (
        c if unicodedata.category(c)[0] in "LMNPS" or c == " " else f"\\u{ord(c):04x}" for c in cut
    )
    return "".join(seen) if len(cut.strip()) else repr(cut)


@lru_cache(4096)
def _word(word: str) -> tuple[str, str]:
    """A word for an element's text and for an attribute, where nothing but marks can isolate."""
    text = html.escape(visible(word))
    return text, text if text.isascii() else f"\u2068{text}\u2069"


def passed_up(rollout: Rollout, *, eos: int = EOS) -> Tensor:
    """Probability [B, T] that the reference would have stopped before a token, where the policy
    went on; 0 elsewhere. Raises ValueError for a batch without ref_eos_logprobs."""
    demand_fields(rollout, "ref_eos_logprobs")
    assert rollout.ref_eos_logprobs is not None
    went_on = rollout.mask & (rollout.responses != eos)
    return torch.where(went_on, rollout.ref_eos_logprobs.exp(), 0.0)


def token_columns(
    rollout: Rollout,
    parts: AdvantageParts,
    config: PPOConfig | Convention,
    *,
    logprobs: Tensor | None = None,
) -> dict[str, Tensor]:
    """What a table says about every token, name with unit -> [B, T].

    Give the whole batch, of which a gradient weight is a share: d surrogate / d log-prob under
    `logprobs` [B, T] nats (default: those of sampling, so the weight before the first step).
    """
    told = replace(rollout, advantages=parts.total)
    with torch.enable_grad():  # a slider's callback may come with its gradients switched off
        slope = surrogate_slope(rollout.logprobs if logprobs is None else logprobs, told, config)
    return {
        "log-ratio, nats": rollout.logprobs - rollout.ref_logprobs,
        "advantage": parts.total,
        **{f"{name} part": x for name, x in vars(parts).items() if x is not None},
        "gradient weight, thousandths": 1000 * slope * parts.total,
    }


def _numbers(name: str, values: Any, mask: np.ndarray) -> np.ndarray:
    """Values [B, T] as float64; ValueError for another shape, and for NaN within the mask."""
    found = torch.as_tensor(values).detach().double().cpu().numpy()
    if found.shape != mask.shape:
        raise ValueError(f"{name} has shape {found.shape}, its mask {mask.shape}: give both [B, T]")
    bad = np.argwhere(~np.isfinite(found) & mask)
    if len(bad):
        row, t = map(int, bad[0])
        raise ValueError(
            f"{name} is {found[row, t]} at answer {row}, token {t}: "
            "find the step that made it, or leave the token out of the mask"
        )
    return found


def _shown(words: Sequence[Sequence[str]], mask: Any) -> tuple[np.ndarray, list[list[int]]]:
    """The mask and, for each answer, the tokens that there is room for."""
    mask = torch.as_tensor(mask).detach().cpu().numpy()
    if mask.dtype != bool or mask.ndim != 2 or len(mask) != len(words):
        raise ValueError(
            f"the mask is {mask.dtype} {mask.shape} for {len(words)} answers: give a bool [B, T]"
        )
    if not 0 < len(words) <= ANSWERS:
        raise ValueError(f"a map shows 1 to {ANSWERS} answers, not {len(words)}: choose some rows")
    at = [np.flatnonzero(row) for row in mask]
    for row, (given, found) in enumerate(zip(words, at, strict=True)):
        if len(found) and found[-1] >= len(given):
            raise ValueError(
                f"answer {row} has {len(given)} words, but its mask reaches token {found[-1]}: "
                "give a word for every token"
            )
    return mask, [found[: TOKENS // len(words)].tolist() for found in at]


def _left_out(mask: np.ndarray, row: int, at: list[int]) -> str:
    rest = int(mask[row].sum()) - len(at)
    if not rest:
        return ""
    return f" <b>… {rest} more tokens are left out: only the first {len(at)} are shown.</b>"


def heat_map(
    words: Sequence[Sequence[str]],
    values: Any,
    mask: Any,
    *,
    unit: str,
    limit: float,
    name: str = "advantage",
    titles: Sequence[str] = (),
    stops: Any = None,
    up: str = "pushed up",
    down: str = "pushed down",
    columns: Mapping[str, Any] | None = None,
) -> str:
    """The map of some answers as HTML, for ipywidgets.HTML or IPython.display.HTML.

    `words` one row an answer, a word for every token; `values` and `mask` [B, T]; full colour at
    +-`limit`, in `unit`; `titles` one an answer; `stops` [B, T] as `passed_up` gives it marks
    where the reference would have stopped; `up` and `down` say what the signs mean. `columns`
    (`token_columns`) adds a table, closed at every redraw. Raises ValueError, in one sentence,
    for NaN, for shapes that do not fit and for more than ANSWERS answers.
    """
    flags, at = _shown(words, mask)
    x = _numbers(name, values, flags)
    p = np.zeros_like(x) if stops is None else _numbers("stops", stops, flags)
    if not 0 < limit < np.inf:
        raise ValueError(f"limit is {limit}: give the value of full colour, above 0")
    what, per = html.escape(visible(name, 80)), html.escape(visible(unit, 80))
    lines = []
    for row, title in enumerate(_titles(titles, len(words))):
        spans = _spans(words[row], x[row].tolist(), p[row].tolist(), at[row], limit, what, per)
        lines.append(f"<p><b><bdi>{title}</bdi>:</b> {spans}{_left_out(flags, row, at[row])}</p>")
    legend = _legend(what, per, limit, up, down, stopped=bool((p[flags] >= HALF).any()))
    more = ""
    if columns is not None:
        more = CLOSED.format(token_table(words, columns, mask, titles=titles))
    return (
        f'<style>{STYLE}</style><div class="minirlhf-heat" role="group" '
        f'aria-label="Heat map of tokens: {what}, {per}">{legend}{"".join(lines)}{SAY}</div>{more}'
    )


def _titles(titles: Sequence[str], n: int) -> list[str]:
    """Escaped titles, one an answer."""
    given = list(titles) or [f"answer {row}" for row in range(n)]
    if len(given) != n:
        raise ValueError(f"{len(given)} titles for {n} answers: give one title an answer, or none")
    return [html.escape(visible(title, 200)) for title in given]


def _spans(
    words: Sequence[str],
    x: list[float],
    p: list[float],
    at: list[int],
    limit: float,
    name: str,
    unit: str,
) -> str:
    """The words of one answer, each in its colour."""
    out = []
    for t in at:
        value = x[t]
        text, said = _word(words[t])
        sign = "n" if value < 0 else "p"
        level = min(round(LEVELS * abs(value) / limit), LEVELS)
        looks = f"{sign} {sign}{level}" if value else "z"
        also = ""
        if p[t] >= HALF:
            also = f"; the reference would have stopped before this word ({p[t]:.2f})"
            out.append('<i aria-hidden="true">▮</i>')
        out.append(
            f'<bdi class="{looks}" tabindex="0" role="img" title="{value:+.3f} {unit}" '
            f'aria-label="{said}, token {t}: {name} {value:+.3f} {unit}{also}">{text}</bdi> '
        )
    return "".join(out)


def _legend(name: str, unit: str, limit: float, up: str, down: str, *, stopped: bool) -> str:
    """What colours, glyphs and bars mean, with numbers and unit."""
    ends = []
    for share in (-1.0, -0.5, 0.0, 0.5, 1.0):
        sign = "n" if share < 0 else "p"
        looks = f"{sign} {sign}{round(LEVELS * abs(share))}" if share else "z"
        beyond = {-1.0: " or less", 1.0: " or more"}.get(share, "")
        ends.append(f'<bdi class="{looks}">{abs(share) * limit:.3g}{beyond}</bdi> ')
    up, down = (html.escape(visible(text, 80)) for text in (up, down))
    said = f"<b>{name}, {unit}:</b> {''.join(ends)} &emsp; below 0: {down}; above 0: {up}"
    bar = ""
    if stopped:
        bar = (
            f"<p>▮ the reference would have stopped here (it ends the answer with a probability "
            f"of {HALF} or more); the policy went on.</p>"
        )
    return f"<p>{said}</p>{bar}"


def token_table(
    words: Sequence[Sequence[str]],
    columns: Mapping[str, Any],
    mask: Any,
    *,
    titles: Sequence[str] = (),
) -> str:
    """Every token with its numbers as an HTML table in a box that scrolls, some 280 px high.

    `columns` maps a heading with its unit to values [B, T]. Raises ValueError as `heat_map` does.
    """
    flags, at = _shown(words, mask)
    numbers = [_numbers(name, x, flags).tolist() for name, x in columns.items()]
    heads = [html.escape(visible(name, 80)) for name in ("token", "t", *columns)]
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    body = []
    for row, title in enumerate(_titles(titles, len(words))):
        said = f"<bdi>{title}</bdi>{_left_out(flags, row, at[row])}"
        whole = f'<tr><th scope="rowgroup" colspan="{len(heads)}">{said}</th></tr>'
        body.append(f"<tbody>{whole}")
        for t in at[row]:
            cells = "".join([f"<td>{x[row][t]:+.3f}</td>" for x in numbers])
            word = f'<th scope="row" class="word"><bdi>{_word(words[row][t])[0]}</bdi></th>'
            body.append(f"<tr>{word}<td>{t}</td>{cells}</tr>")
        body.append("</tbody>")
    return (
        f'<style>{STYLE}</style><div class="minirlhf-heat box" tabindex="0" role="region" '
        f'aria-label="Values of every token"><table><thead><tr>{head}</tr></thead>'
        f"{''.join(body)}</table></div>"
    )
