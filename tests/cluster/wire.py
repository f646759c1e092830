"""A line that takes its time: passes packets between two TUN devices, each after a fixed delay.

    python wire.py FD FD MICROSECONDS

It stands for `tc qdisc … netem delay` on kernels without netem. What is lost or reordered is nothing; how fast packets
come is up to the queues of the two devices. Run it at a high priority: it is the cable.
"""

import os
import select
import sys
import time
from collections import deque

MTU = 65536


def main():
    ends = [int(number) for number in sys.argv[1:3]]
    delay_s = int(sys.argv[3]) / 1e6
    for end in ends:
        os.set_blocking(end, False)
    other = dict(zip(ends, reversed(ends), strict=True))
    under_way = {end: deque() for end in ends}  # (when it is due, packet), by where it goes
    while True:
        due = min((line[0][0] for line in under_way.values() if line), default=None)
        wait_s = None if due is None else max(0.0, due - time.monotonic())
        for end in select.select(ends, [], [], wait_s)[0]:
            take(end, under_way[other[end]], delay_s)
        for end, line in under_way.items():
            while line and line[0][0] <= time.monotonic():
                give(end, line.popleft()[1])


def take(end, line, delay_s):
    """All packets that the device has for us."""
    while True:
        try:
            packet = os.read(end, MTU)
        except BlockingIOError:
            return
        line.append((time.monotonic() + delay_s, packet))


def give(end, packet):
    try:
        os.write(end, packet)
    except OSError:  # the host at this end is down: a packet to it is lost, as on any cable
        return


if __name__ == "__main__":
    main()
