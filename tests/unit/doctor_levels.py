"""What a list of the doctor's findings comes to."""

from autotune.doctor import Level


def levels(findings):
    return {finding.check: finding.level for finding in findings}


def worst(findings):
    return max(findings, key=lambda finding: list(Level).index(finding.level))
