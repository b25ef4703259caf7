import asyncio
import json

import numpy as np
import pytest
from conftest import make_images

aiohttp = pytest.importorskip("aiohttp")
from aiohttp import web  # noqa: E402

from vitopt.errors import MeasurementError, UnsupportedError  # noqa: E402
from vitopt.serve import load  # noqa: E402
