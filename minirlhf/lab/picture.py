"""Pictures in a notebook: a still one, and one that follows a slider without flicker.

A figure is laid out once. Under a slider only the artists that move are drawn again, on a copy of
the background ("blitting"), and the result goes to the browser as one <img> with an alt text: a
few milliseconds where a full draw takes a tenth of a second. A panel also carries a picture of
itself, so a saved notebook shows it where no kernel runs.

pyplot is never used: a slider's callback may run on another thread than the cells do, and pyplot
keeps one current figure for all of them. Left out: zooming, hovering, anything in JavaScript.
"""

import base64
import html
import io
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import ipywidgets as widgets
import numpy as np
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image


def png(figure: Figure, *, dpi: float | None = None) -> bytes:
    """The figure as PNG bytes, `dpi` pixels an inch (default: the figure's own)."""
    if dpi is not None:
        figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    # 256 colours are plenty for lines and text, at less than half the bytes
    few = _image(canvas).quantize(256, method=Image.Quantize.MEDIANCUT)
    return _png(few, optimize=True)


def _image(canvas: FigureCanvasAgg) -> Image.Image:
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])  # a figure is opaque


def _png(image: Image.Image, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, "png", **options)
    return out.getvalue()


def image_tag(data: bytes, alt: str, width: int) -> str:
    """PNG bytes as an <img> with alt text, `width` CSS pixels wide or as wide as there is room."""
    return (
        f'<img alt="{html.escape(alt, quote=True)}" style="width:{width}px;max-width:100%;'
        f'height:auto" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
    )


class Picture:
    """A still figure as a cell's last line: PNG, with the figure's label as its text.

    Every figure of `plots` is labelled with the sentence that a lecturer would say about it.
    """

    def __init__(self, figure: Figure, *, dpi: float = 100):
        self.alt = str(figure.get_label())
        self.data = png(figure, dpi=dpi)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict, dict]:
        return _bundle(self.data, self.alt)


def _bundle(data: bytes, alt: str) -> tuple[dict, dict]:
    picture = {"image/png": base64.b64encode(data).decode(), "text/plain": alt}
    return picture, {"image/png": {"alt": alt}}


class LiveFigure:
    """A figure laid out once; `redraw` draws only `artists` anew and shows the result in `view`.

    Axis limits, titles and ticks are part of the background: fix them for the whole range of the
    slider, so that change is seen as motion. HTML in `above` and `below` is shown with the
    picture, from the next redraw on. Safe to call from any thread.
    """

    def __init__(self, figure: Figure, artists: Sequence[Artist], *, width: int):
        self.view = widgets.HTML()
        self.above = ""
        self.below = ""
        self.alt = ""
        self.data = b""
        self.lock = threading.RLock()
        self._artists = list(artists)
        self._width = width
        self._canvas = FigureCanvasAgg(figure)
        for artist in self._artists:
            artist.set_animated(True)  # left out of a full draw
        self._canvas.draw()
        figure.set_layout_engine("none")  # what was laid out stays where it is
        self.lay_out()

    def lay_out(self) -> None:
        """Draw the background; again, if limits have moved."""
        self._canvas.draw()
        self._background = self._canvas.copy_from_bbox(self._canvas.figure.bbox)

    def redraw(self, alt: str) -> None:
        """Draw the moving artists over the background and send the picture with its alt text."""
        with self.lock:
            self._canvas.restore_region(self._background)
            for artist in self._artists:
                if artist.axes is not None:
                    artist.axes.draw_artist(artist)
            self.alt = alt
            # level 1: half the time of the default for a tenth more bytes
            self.data = _png(_image(self._canvas), compress_level=1)
            picture = image_tag(self.data, alt, self._width)
            # one value is one message: text and picture change in the same frame
            self.view.value = self.above + picture + self.below


class Panel(widgets.VBox):
    """Dials over a live figure: live where a kernel runs, a picture wherever none does.

    `controls` are widgets by name. `move(**values)` gets their values at every turn, sets the
    figure's artists and returns the alt text; it must be fast (a tenth of a second is felt) and
    may run on another thread. `between` stands between the controls and the figure.

    A new panel of the same `name` closes the one before it: widgets live in the kernel and in the
    browser until they are closed, so running a cell again would pile them up.
    """

    _shown: ClassVar[dict[str, "Panel"]] = {}

    def __init__(
        self,
        name: str,
        controls: Mapping[str, Any],
        live: LiveFigure,
        move: Callable[..., str],
        between: Sequence[widgets.Widget] = (),
    ):
        super().__init__([*controls.values(), *between, live.view])
        self.controls = dict(controls)
        self.live = live
        self._move = move
        for control in self.controls.values():
            control.observe(self.update, "value")
        self.update()
        previous = Panel._shown.get(name)
        if previous is not None:
            previous.close()
        Panel._shown[name] = self

    def values(self) -> dict[str, Any]:
        """What the controls say now, by name."""
        return {name: control.value for name, control in self.controls.items()}

    def update(self, _change: Any = None) -> None:
        """Draw what the controls say; from any thread."""
        with self.live.lock:
            self.live.redraw(self._move(**self.values()))

    def still(self) -> tuple[bytes, str]:
        """PNG bytes and alt text of what the panel shows now."""
        return self.live.data, self.live.alt

    def close(self) -> None:
        """Close the panel and everything in it."""
        for child in self.children:
            child.close()
        super().close()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None, **options: Any) -> Any:
        shown = super()._repr_mimebundle_(include=include, exclude=exclude, **options)
        with self.live.lock:
            data, notes = _bundle(*self.still())
        return {**(shown or {}), **data}, notes


def slider(text: str, value: float, low: float, high: float, step: float) -> Any:
    """A slider with its whole label; of whole numbers if `step` is an int.

    `value` must lie on a step: the browser would move it to one.
    """
    if isinstance(step, int):
        return widgets.IntSlider(value, low, high, step, description=text, **looks())
    shown = ".4f" if step < 0.01 else ".2f"
    limits = {"min": low, "max": high, "step": step, "readout_format": shown}
    return widgets.FloatSlider(value, **limits, description=text, **looks())


def looks() -> dict[str, Any]:
    """Style and layout of a control: labels are not cut, tracks are long enough to aim at."""
    room = widgets.Layout(width="640px", max_width="100%")
    return {"style": {"description_width": "130px"}, "layout": room}
