"""Data for simulations, from local files and from nothing: no loader here reaches for a network.

`images` reads IDX and CIFAR, `tables` CSV, NPZ and LEAF; `bundled` has the small sets of scikit-learn; `synthetic`
makes machines that vibrate and roads that fill. All of them give a TensorDataset of float32 inputs and targets, some
with `groups`: who or what each example is of, by which `[simulation] partition = "groups"` divides.
"""
