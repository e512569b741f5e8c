"""The main of each role, loaded before the first fork, so that no child has to load anything.

Data flow: supervisor -> [workers.roles] -> workers.{control,services,reader,writer}
A module of its own since it is the one place that knows them all.
"""

from collections.abc import Mapping

from nebula_mp.workers import control, reader, services, writer
from nebula_mp.workers.parts import Role
from nebula_mp.workers.spawn import Main


def real_mains() -> Mapping[Role, Main]:
    """Give them, and load what they would load later."""
    services.preload()
    return {
        Role.CONTROL: control.main,
        Role.SERVICES: services.main,
        Role.READER: reader.main,
        Role.WRITER: writer.main,
    }
