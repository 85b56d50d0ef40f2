# Every target is one call of course.py, which needs nothing but Python 3.11, 3.12 or 3.13.
# Without make: python course.py course, python course.py test, and so on.
PYTHON ?= python3

.PHONY: help setup course test lab results doctor

help:
	@$(PYTHON) course.py --help

setup course test lab results doctor:
	@$(PYTHON) course.py $@
