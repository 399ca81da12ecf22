"""Run with `pytest`: the normalizer keeps the contract that exnorm relies on."""

from exnorm_rms import RmsNorm

from exnorm.testing import check_norm


def test_rms_norm() -> None:
    check_norm(RmsNorm)
