"""The fault campaign in small: some trials of each kind, about a minute. All of them: make faults."""
import subprocess
import sys

import pytest

from tests.faults.processes import ENVIRONMENT, ROOT


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_is_lost_or_wrong_whatever_happens():
    done = subprocess.run([sys.executable, "-m", "tests.faults.campaign", "--quick"], cwd=ROOT, env=ENVIRONMENT,
                          capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
