"""`sparsevila serve --address` of a cluster that is not there: one line, in time."""

import socket
import time

import pytest

from tests.cluster.serve_process import ServeProcess

pytestmark = pytest.mark.slow
START_TIMEOUT_S = 3.0
# To import Ray, and for Ray's threads to end, on a machine that does other things as well.
SLACK_S = 60.0


@pytest.mark.parametrize("how", ["closed", "silent"])
def test_an_address_where_no_ray_answers_is_told_in_time(tmp_path, how):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        if how == "silent":
            bound.listen()
        (tmp_path / "cluster.yaml").write_text(f"start_timeout_s: {START_TIMEOUT_S}\n")
        begun_s = time.monotonic()
        served = ServeProcess(tmp_path, "--config", "cluster.yaml", "--address", f"127.0.0.1:{port}")
        try:
            assert served.process.wait(START_TIMEOUT_S + SLACK_S) == 1
        finally:
            served.kill()
    (line,) = [line for line in served.log.read_text().splitlines() if line.startswith("error:")]
    assert f"no Ray cluster at '127.0.0.1:{port}'" in line and served.out.read_text() == ""
    assert time.monotonic() - begun_s < START_TIMEOUT_S + SLACK_S
