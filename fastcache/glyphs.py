"""The shipped picture set by its public name; it lives in fastcache.workshop.glyphs."""

from fastcache.workshop import glyphs as _glyphs
from fastcache.workshop.glyphs import DIFFUSION, load_classifier, load_glyph_dit, weights_path

__path__ = _glyphs.__path__  # `python -m fastcache.glyphs.train` goes on working
__all__ = ["DIFFUSION", "load_classifier", "load_glyph_dit", "weights_path"]
