"""Workers on several hosts listen where the others can reach them, whatever their host's name leads to."""

from __future__ import annotations

import socket

import psutil

from workers.rank import interface_of


def test_every_address_of_this_host_has_its_interface():
    for name, has in psutil.net_if_addrs().items():
        for each in has:
            if each.family in (socket.AF_INET, socket.AF_INET6):
                assert interface_of(each.address) == name


def test_an_address_that_nobody_has_here_has_none():
    assert interface_of("203.0.113.77") is None
