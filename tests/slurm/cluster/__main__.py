from tests.slurm.cluster import main

main()
