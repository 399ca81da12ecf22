"""The data sets: one file each, named as in `conf/data/`. `exnorm.data` says which functions a file has."""
