"""What users would pick instead, written from the published formulas; one algorithm a file.

Each is tested equal to the float64 reference with the rule it stands for (tests/test_bench.py).
"""
