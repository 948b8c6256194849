"""What runs beside the network: letterbox, suppression, mask paste and run lengths.

`ops` is what the rest of the project calls; `reference` and `mask_reference` say in plain torch what each operation
means.
"""
