# SPDX-License-Identifier: GPL-3.0-or-later
"""The models are whole, and a second run has cost next to nothing."""

from __future__ import annotations

import pytest

MODELS = {"/srv/models/tiny/http-main": "/srv/web/tiny", "/srv/models/other/http-main": "/srv/share/other"}


@pytest.mark.parametrize("place", MODELS)
def test_a_model_is_whole(host, place):
    assert host.file(place).is_symlink
    host.run_expect([0], f"cd {place}/ && sha256sum --quiet -c MANIFEST.sha256")
    host.run_expect([0], f"cmp {place}/model.safetensors {MODELS[place]}/model.safetensors")
    assert host.file(f"{place}/model.safetensors").mode == 0o644


def test_nothing_is_left_on_the_way(host):
    assert host.check_output("find /srv/models/.staging -name '*.incomplete' -o -type d | tail -n +2") == ""
    assert host.check_output("ls -A /small") == ""


def test_no_process_and_no_port_stay(host):
    assert "18670" not in host.check_output("ss -ltn")


def test_the_second_run_asked_the_server_for_nothing(host):
    """Check mode, converge and idempotence have run: one listing each before the model was there, one fetch, then silence."""
    log = host.check_output("journalctl -u models -o cat")
    assert log.count('"GET /tiny/model.safetensors') == 1
    listings = log.count('"GET /tiny/MANIFEST.sha256')
    # Of check and converge: two refusals and the role each. A second run asks for those it refuses alone.
    assert listings == 3 + 3 + 2
