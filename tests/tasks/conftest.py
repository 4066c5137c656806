"""Each task's module binds its data folder when it is imported: let that be before a test puts another in its place."""

from longseq_tutorial import tasks

for _name in tasks.names():
    tasks.options(_name)
