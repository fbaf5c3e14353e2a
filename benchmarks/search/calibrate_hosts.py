"""Sweep the two hosts that `record.py` records `cpu4-2hosts` on: what `doctor --measure` does here.

    python benchmarks/search/calibrate_hosts.py [LANDSCAPE]    # root: it makes network namespaces

Writes landscapes/NAME.calibration.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

from netns import Hosts
from record_spaces import landscape_named

from autotune.calibrate.store import save_calibration
from autotune.calibrate.sweep import Places, measure_machine
from autotune.spec.model import load_model

FOLDER = Path(__file__).parent / "landscapes"


def main() -> None:
    landscape = landscape_named(sys.argv[1] if len(sys.argv) > 1 else "cpu4-2hosts")
    per_host = landscape.ranks // landscape.hosts
    with Hosts(landscape.rate_mbit) as hosts:
        prefixes = tuple(
            ("ip", "netns", "exec", hosts.names[host], "taskset", "-c", cores_of(hosts, host))
            for host in range(landscape.hosts)
            for _ in range(per_host)
        )
        places = Places(
            prefixes=prefixes, master_address=hosts.addresses[0], num_nodes=landscape.hosts
        )
        calibration, notes = measure_machine(
            "cpu",
            landscape.ranks,
            places=places,
            model=load_model(landscape.model),
            seq_lens=(landscape.seq_len,),
        )
    for note in notes:
        print(f"not measured: {note}")
    path = FOLDER / f"{landscape.name}.calibration.json"
    save_calibration(calibration, path)
    print(f"Wrote {path}, measured in {calibration.duration_s:.0f} s")


def cores_of(hosts: Hosts, host: int) -> str:
    return ",".join(map(str, hosts.cores[host]))


if __name__ == "__main__":
    main()
