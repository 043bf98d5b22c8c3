"""The server and the checkpoints that commands are tried on."""

from tests.client.conftest import served as served
from tests.quantization.conftest import text_model as text_model
from tests.quantization.conftest import vl as vl
