#!/bin/bash
# sbatch deploy/slurm.sh; see docs/scale.md
#SBATCH --job-name=prune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append

OUTPUT=/shared/runs/small
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export EFFICIENTLLM_CACHE=/shared/cache
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 --shutdown-timeout 240 \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:29500" --rdzv-id "$SLURM_JOB_ID" \
  -m efficientllm.runtime.start train --preset recover --source /shared/Llama-3.2-1B --data /shared/corpus.jsonl \
  --tokens 10B --target-ratio 0.5 --output "$OUTPUT" --resume-or-start
if [ ! -f "$OUTPUT/architecture.json" ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
