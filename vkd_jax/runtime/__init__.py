"""Processes, devices, files and memory: everything below the models.

    multihost    which process writes, and how the others learn of it
    mesh         the device mesh, its axis names, and sharding rules
    storage      folders on disks and in buckets
    files        atomic writes
    hub          models and data sets by name
    log          what is shown on stderr
    malloc       settings of the C library's allocator
    provenance   the commit that runs

Contract: nothing here knows models, methods or benchmarks; errors that a user can fix are `UserError`s that say how.
"""
