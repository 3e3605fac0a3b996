"""A qemu-img that lies, once in a merge: nothing is deleted, and an honest one ends it well."""

from __future__ import annotations

import json
import sys

from torture.cases import Case, draw
from torture.kills import Trials, Try, go_on, prepared
from torture.place import Loss, Place, Planned
from torture.process import Child

__all__ = ["LIES", "Liars"]

LIES = ("nothing", "half", "elsewhere", "damage", "failure", "rot")
"""What it does: nothing; some of it, until a write of its own; all of it, in a copy of the
directory; all of it, and then a sector of what it has written is overwritten, by nobody; all of
it, and says that it failed. But for the last it says that all is well."""

_WRAPPER = """#!/bin/sh
number=0
[ ! -e "$TORTURE/number" ] || read -r number <"$TORTURE/number"
number=$((number + 1))
echo $number >"$TORTURE/number"
[ "$LIE_AT" = $number ] || exec qemu-img "$@"
: >"$TORTURE/hit"
case $LIE in
nothing) exit 0 ;;
half) strace -f -o /dev/null -e trace=$LIE_CALL -e inject=$LIE_CALL:signal=KILL:when=$LIE_NTH \\
    qemu-img "$@" 2>/dev/null; exit 0 ;;
failure) qemu-img "$@"; echo "qemu-img: it did not work" >&2; exit 1 ;;
*) exec {python} "$TORTURE/liar.py" "$@" ;;
esac
"""

# As a program of its own: in the directory of the images nothing of it is left.
_LIAR = """
import json, os, re, shutil, subprocess, sys
from random import Random
given = json.loads(os.environ["LIE_WORDS"])
images, scratch, dice = given["images"], given["scratch"], Random(given["seed"])
argv = sys.argv[1:]
if os.environ["LIE"] == "elsewhere":
    aside = os.path.join(scratch, "elsewhere")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(images, aside, symlinks=True)
    here = os.getcwd().replace(images, aside)
    done = subprocess.run(["qemu-img", *(word.replace(images, aside) for word in argv)], cwd=here)
    sys.exit(done.returncode)
files = [os.path.join(at, name) for at, _, names in os.walk(images) for name in names]
files = [path for path in files if not os.path.islink(path) and ".journal" not in path]
def read(path):
    with open(path, "rb") as file:
        return file.read()
before = {path: read(path) for path in files}
done = subprocess.run(["qemu-img", *argv])
pattern = re.compile(rb"[A-H][0-9]{15}")
spots = []
for path in files:
    was, now = before[path], read(path) if os.path.exists(path) else b""
    spots += [
        (path, at) for at in range(0, len(now), 512)
        if (now[at : at + 512] == was[at : at + 512]) == (now != was and os.environ["LIE"] == "rot")
        and pattern.match(now, at)
    ]
if spots and not (os.environ["LIE"] == "rot" and "-u" in argv):
    path, at = dice.choice(spots)
    with open(path, "r+b") as file:
        file.seek(at + 100)
        file.write(b"nobody wrote this")
    with open(os.path.join(os.environ["TORTURE"], "damaged"), "w") as file:
        file.write(str(os.stat(path).st_ino))
sys.exit(done.returncode)
"""


def drawn(seed: int) -> Case:
    """A case, every other one verified by a manifest."""
    return draw(seed, verify=("moved", "manifest"))


class Liars(Trials):
    """One case, merged `tries` times with a tool that lies at one of its calls."""

    def prepare(self) -> tuple[Place, Planned]:
        """A case that is verified in one of two ways."""
        return prepared(self.seed, self.scratch, self.scratch / "images", self.work, drawn)

    def once(self, this: Try) -> None:
        """Merge with the liar, then go on with the real one."""
        place, planned, counts, dice = this.place, this.planned, this.counts, this.dice
        place.restore()
        lie = dice.choice(LIES if place.case.verify == "manifest" else LIES[:-1])
        writing = sorted(at for at, calls in counts.theirs.items() if calls)
        at = dice.choice(writing)
        call = dice.choice(sorted(counts.theirs[at]))
        nth = dice.randint(1, counts.theirs[at][call])
        self.doing = f"{self.doing.split(',')[0]}, {lie} in qemu-img's run {at} ({call} {nth})"
        words = {
            "images": str(place.directory),
            "scratch": str(self.scratch),
            "seed": dice.random(),
        }
        (self.work / "damaged").unlink(missing_ok=True)
        program = self.work / "liar"
        program.write_text(_WRAPPER.replace("{python}", sys.executable))
        program.chmod(0o755)
        (self.work / "liar.py").write_text(_LIAR)
        environment = {
            "LIE": lie,
            "LIE_AT": str(at),
            "LIE_CALL": call,
            "LIE_NTH": str(nth),
            "LIE_WORDS": json.dumps(words),
        }
        argv = place.case.argv(place.directory)
        ended = Child(argv, self.work, program=program, environment=environment).end()
        if ended.code not in (0, 3, 5) or "internal error" in ended.err:
            raise Loss(f"{lie}: it ended with {ended.code}: {ended.err}")
        notes = self.tally.notes
        notes["caught" if ended.code else "harmless"] += 1
        notes[lie] += 1
        if ended.code == 0:
            place.finished(planned, f"{lie}, not noticed")
            return
        if planned.alone and not place.names() >= {image.name for image in place.case.images}:
            # After the switch nothing but the header of the one above is written: of that group
            # only names may be gone that the result has taken.
            if not place.names() >= set(planned.results):
                raise Loss(f"{lie}: there are {sorted(place.names())}")
            notes["after the switch"] += 1
        if lie == "damage" and self.in_place(place):
            # It was written into the very image that is kept: noticed, and that is all.
            notes["the kept image itself damaged"] += 1
            return
        if lie == "rot":
            # Whatever shows that sector is damaged, by the tool: noticed, and nothing is deleted.
            if planned.alone and not place.names() >= {image.name for image in place.case.images}:
                raise Loss(f"{lie}: there are {sorted(place.names())}")
            return
        place.intact(planned, lie)
        go_on(place, planned, self.work, dice, self.tally, patient=True)

    def in_place(self, place: Place) -> bool:
        """Whether the tool has damaged a kept image itself; what was below it must be there."""
        damaged = self.work / "damaged"
        if not damaged.exists():
            return False
        number = int(damaged.read_text())
        damaged.unlink()
        for name in place.case.kept:
            path = place.directory / name
            if not path.exists() or path.stat().st_ino != number:
                continue
            if place.content(name) == place.points[name]:
                return False
            gone = [each for each in place.case.dropped_below(name) if each not in place.names()]
            if gone:
                raise Loss(f"damaged {name}, and {gone} are deleted")
            return True
        return False
