#!/bin/bash
# Several machines with eight GPUs each, under Slurm: weights on each GPU, bfloat16. From the root of the repository:
#   mkdir -p runs/paper
#   sbatch --nodes 4 launch/slurm.sh -m refined_ldm train --preset paper --stage ldm --run runs/paper --resume
# The folder of the run must be on a disk that all machines share. `batch_size` of the configuration is that of a step
# over all processes. Two minutes before the time is over Slurm sends SIGTERM: the step is finished and saved.
#SBATCH --job-name=refined-ldm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail
read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export first
srun bash -c 'exec accelerate launch --config_file launch/bf16.yaml --num_machines "$SLURM_NNODES" \
    --machine_rank "$SLURM_NODEID" --num_processes "$((8 * SLURM_NNODES))" --main_process_ip "$first" \
    --main_process_port "${MASTER_PORT:-29500}" "$@"' launch "$@"
