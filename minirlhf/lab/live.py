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
from collections.abc import Callable, Sequence
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
    return _encode(canvas, optimize=True)


def _encode(canvas: FigureCanvasAgg, **options: Any) -> bytes:
    out = io.BytesIO()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]  # opaque: a figure has a white face
    Image.fromarray(pixels).save(out, "png", **options)
    return out.getvalue()


def base64_text(data: bytes) -> str:
    """Bytes as text for a data: address or a notebook's output."""
    return base64.b64encode(data).decode("ascii")


def image_tag(data: bytes, alt: str, width: int) -> str:
    """PNG bytes as an <img> with alt text, `width` CSS pixels wide or as wide as there is room."""
    return (
        f'<img alt="{html.escape(alt, quote=True)}" style="width:{width}px;max-width:100%;'
        f'height:auto" src="data:image/png;base64,{base64_text(data)}">'
    )


class Picture:
    """A still figure as a cell's last line: PNG, with the figure's label as its text.

    Every figure of `plots` is labelled with the sentence that a lecturer would say about it.
    """

    def __init__(self, figure: Figure, *, dpi: float = 100):
        self.alt, self.data = str(figure.get_label()), png(figure, dpi=dpi)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict, dict]:
        return _bundle(self.data, self.alt)


def _bundle(data: bytes, alt: str) -> tuple[dict, dict]:
    return {"image/png": base64_text(data), "text/plain": alt}, {"image/png": {"alt": alt}}


class LiveFigure:
    """A figure laid out once; `redraw` draws only `artists` anew and shows the result in `view`.

    Axis limits, titles and ticks are part of the background: fix them for the whole range of the
    slider, so that change is seen as motion. Safe to call from any thread.
    """

    def __init__(self, figure: Figure, artists: Sequence[Artist], *, width: int):
        self.view = widgets.HTML()
        self.lock = threading.RLock()
        self._artists, self._width = list(artists), width
        self._canvas = FigureCanvasAgg(figure)
        for artist in self._artists:
            artist.set_animated(True)  # left out of a full draw
        self._canvas.draw()
        figure.set_layout_engine("none")  # what was laid out stays where it is
        self._canvas.draw()
        self._background = self._canvas.copy_from_bbox(figure.bbox)
        self.alt, self.data = "", b""

    def redraw(self, alt: str) -> None:
        """Draw the moving artists over the background and send the picture with its alt text."""
        with self.lock:
            self._canvas.restore_region(self._background)
            for artist in self._artists:
                if artist.axes is not None:
                    artist.axes.draw_artist(artist)
            # level 1: half the time of the default for a tenth more bytes
            self.alt, self.data = alt, _encode(self._canvas, compress_level=1)
            self.view.value = image_tag(self.data, alt, self._width)


class Panel(widgets.VBox):
    """A column of widgets: live where a kernel runs, a picture wherever none does.

    `still` returns PNG bytes and the text that stands for them; it is called when the panel is
    shown. A new panel of the same `name` closes the one before it: widgets live in the kernel and
    in the browser until they are closed, so running a cell again would pile them up.
    """

    _shown: ClassVar[dict[str, "Panel"]] = {}

    def __init__(
        self,
        name: str,
        children: Sequence[widgets.Widget],
        still: Callable[[], tuple[bytes, str]],
    ):
        super().__init__(children)
        self._still = still
        if (previous := Panel._shown.get(name)) is not None:
            previous.close()
        Panel._shown[name] = self

    def close(self) -> None:
        """Close the panel and everything in it."""
        _close(self.children)
        super().close()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None, **options: Any) -> Any:
        live = super()._repr_mimebundle_(include=include, exclude=exclude, **options)
        data, notes = _bundle(*self._still())
        return {**(live or {}), **data}, notes


def _close(children: Sequence[widgets.Widget]) -> None:
    for child in children:
        _close(getattr(child, "children", ()))
        child.close()
