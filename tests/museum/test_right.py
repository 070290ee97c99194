"""What the exhibits are variations of is right, and each of them is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from lanes import built, close
from laws import for_all
from museum import EXHIBITS, RIGHT
from softmax import as_held
from strategies import Case, cases, windows
from tolerance import largest, output_error, score_error

from arrattn import feature_maps, reference
