"""Check of the optional packages, by extra."""

from idefics2_engine.doctor import facts
from idefics2_engine.doctor.check import Check, Status
from idefics2_engine.doctor.machine import Machine
from idefics2_engine.doctor.packages import is_older
from idefics2_engine.errors import install_extras


def optional_packages_check(machine: Machine) -> Check:
    """Check which optional packages are installed, and that they are new enough."""
    present, old, extras = [], [], []
    versions: dict[str, str | None] = {}
    for extra, packages in facts.EXTRAS.items():
        is_complete = True
        for name, least in packages.items():
            package = machine.package(name)
            versions[name] = package.version if package else None
            if package is None:
                is_complete = False
            elif is_older(package.version, least):
                is_complete = False
                old.append(f"{name} {package.version} (needs {least})")
            else:
                present.append(f"{name} {package.version}")
        if not is_complete:
            extras.append(extra)
    missing = [name for name, version in versions.items() if version is None]
    parts = [", ".join(present)] if present else []
    parts += [f"too old: {', '.join(old)}"] if old else []
    parts += [f"not installed: {', '.join(missing)}"] if missing else []
    fix = install_extras(*extras) if extras else ""
    if extras and not old:
        fix = f"if you need them: {fix}"
    status = Status.WARNING if old else Status.OK
    return Check("optional packages", status, "; ".join(parts), fix, {"versions": versions})
