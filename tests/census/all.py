"""Every family."""

from __future__ import annotations

from census import decoders, encoders, mixtures, recurrent, seq2seq, speech, vision
from census.family import Family

FAMILIES: list[Family] = [*mixtures.FAMILIES, *decoders.FAMILIES, *encoders.FAMILIES, *seq2seq.FAMILIES, *vision.FAMILIES, *speech.FAMILIES, *recurrent.FAMILIES]
