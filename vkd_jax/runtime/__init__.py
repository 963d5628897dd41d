"""Processes, devices, files and memory: everything below the models.

    multihost       running code on process 0, and sharing its result and errors with all processes
    mesh            the device mesh, its axis names, and sharding rules
    storage         folders on disks and in buckets (gs://)
    files           atomic writes of files and folders; reads of files that others wrote or that data names
    json_files      the reader of JSON that others wrote
    dataclass_json  dataclasses as JSON objects
    figure_ranges   which figures of results are possible
    interrupts      Ctrl-C in all commands
    commands        how bad input, a missing platform and Ctrl-C end a command
    locks           locks of folders, so that one process at a time writes them
    hub             models and data sets by name: a folder, a bucket, or an id on the Hugging Face hub
    log             the progress that is shown on stderr
    finite          the check for NaN and infinity
    memory          the check that arrays fit in memory, before they are allocated
    threads         threads of XLA on the CPU
    malloc          settings of the C library's allocator
    provenance      the commit of the running code

Contract: modules of this package do not import models, methods or benchmarks. Paths may be on a disk or in a bucket:
pass them through `storage.resolve`, and write files with `files.write_bytes`, so that readers never see half a file.
A file that others wrote is read by `files.read_bytes` or `json_files`, and one that data names is found by
`files.inside`.
Errors that a user can fix are `UserError`s that say what to do. On several hosts, only process 0 writes shared files
(`multihost.run_on_process_0`).

To support another kind of storage, extend `storage.resolve` (model folders and outputs) and `storage.SourceFolder`
(sources of benchmarks).
"""
