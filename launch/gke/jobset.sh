#!/usr/bin/env bash
# A stage on TPU slices of a GKE cluster: prints a JobSet manifest made of a few values, or applies it.
#
#   NAME=... IMAGE=... TYPE=tpu-v5p-slice TOPOLOGY=4x8x8 HOSTS=64 bash launch/gke/jobset.sh [--apply | --xpk] MODULE [FLAGS]
#
#   bash launch/gke/jobset.sh train --config=configs/pretrain.py:70b,tpu=v5p-512 --workdir=/shared/run > run.yaml
#   --apply   kubectl apply instead of printing
#   --xpk     prints the xpk command that does the same (CLUSTER, and TPU as v5p-512)
#   --dry_run prints what would be done, as without --apply
#
# Environment: NAME; IMAGE (launch/Dockerfile); TYPE and TOPOLOGY as node labels; HOSTS of CHIPS each (default 4), which
# together are TOPOLOGY; SLICES (default 1), of which --config.mesh.data is a multiple; RESTARTS (default 100), after preemption
# among others; SPOT=1; CLAIM, a persistent volume claim that all hosts can write, mounted at /shared for the workdir; ENV,
# variables of the containers ("HF_TOKEN XLA_FLAGS='--a --b'"); SERVICE_ACCOUNT (of Kubernetes), NAMESPACE, QUEUE (a local queue
# of Kueue).
set -euo pipefail

# shellcheck source=launch/pods.sh
source "$(dirname "${BASH_SOURCE[0]}")/../pods.sh"

mode=print
dry_run=""
while true; do
  case "${1:-}" in
    --apply | --xpk) mode="${1#--}" ;;
    --dry_run) dry_run=1 ;;
    *) break ;;
  esac
  shift
done
[ -z "$dry_run" ] || [ "$mode" != apply ] || mode=print
module="${1:-}"
[[ "$module" =~ ^[a-z_.]+$ ]] ||
  fail "expected a module of llama_jax and its flags, as in: train --config=configs/pretrain.py:70b; got '$module'"
shift
needed NAME "what to call the run"
[[ "$NAME" =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  fail "NAME=$NAME: expected at most 40 small letters, digits and dashes, the first a letter"
needed IMAGE "the container image (launch/Dockerfile)"
switches SPOT
at_least_one SLICES
[[ "${RESTARTS:-0}" =~ ^[0-9]+$ ]] || fail "RESTARTS=$RESTARTS: expected a number"
read_env

if [ "$mode" = xpk ]; then
  needed CLUSTER "the cluster's name"
  needed TPU "the slice's name, as v5p-512"
  [ -z "${SPOT:-}${CLAIM:-}" ] || fail "SPOT and CLAIM: with --xpk they belong to the cluster (xpk cluster create, xpk storage)"
  [ -z "${SERVICE_ACCOUNT:-}${NAMESPACE:-}${QUEUE:-}" ] || fail "SERVICE_ACCOUNT, NAMESPACE and QUEUE: xpk has its own"
  for variable in "${variables[@]}"; do
    # It writes values into its manifest as they are, between double quotes.
    [[ "$variable" != *[\"\\$'\n']* ]] ||
      fail "ENV: ${variable%%=*} has a double quote, a backslash or an end of a line, which xpk does not pass on"
  done
  dollar='$'  # of two Kubernetes makes one, and puts variables in the place of $(NAME)
  doubled=("${variables[@]//$dollar/$dollar$dollar}")
  # By itself xpk starts again after codes of 127 and more alone; 65 is a run that diverged.
  printf '%q ' xpk workload create --cluster="$CLUSTER" --workload="$NAME" --tpu-type="$TPU" --num-slices="${SLICES:-1}" \
    --docker-image="$IMAGE" --max-restarts="${RESTARTS:-100}" \
    --restart-on-exit-codes=1,69,70,75 --termination-grace-period-seconds=300 "${doubled[@]/#/--env=}" \
    --command="python -m llama_jax.$module$(for_shell "$@")"
  echo
  exit
fi

needed TYPE "cloud.google.com/gke-tpu-accelerator of the nodes, as tpu-v5p-slice"
needed TOPOLOGY "cloud.google.com/gke-tpu-topology of the nodes, as 4x8x8"
needed HOSTS "how many hosts a slice has"
at_least_one HOSTS CHIPS
[[ "$TOPOLOGY" =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] ||
  fail "TOPOLOGY=$TOPOLOGY: expected the chips of a slice along each dimension, as 4x8x8"
chips=$((${TOPOLOGY//x/*}))
[ "$((HOSTS * ${CHIPS:-4}))" -eq "$chips" ] ||
  fail "HOSTS=$HOSTS of CHIPS=${CHIPS:-4}: expected the $chips chips of TOPOLOGY=$TOPOLOGY, got $((HOSTS * ${CHIPS:-4}))"

# A YAML string in double quotes.
quoted() {
  local text="${1//\\/\\\\}"
  text="${text//\"/\\\"}"
  printf '"%s"' "${text//$'\n'/\\n}"
}
# The same for a container: Kubernetes puts variables in the place of $(NAME) there, and makes one $ of two.
literal() { local dollar='$'; quoted "${1//$dollar/$dollar$dollar}"; }
# optional KEY VALUE: a line, if there is a value.
optional() { [ -z "$2" ] || echo "$1: $(quoted "$2")"; }

arguments() { for argument in "-m" "llama_jax.$module" "$@"; do echo "                - $(literal "$argument")"; done; }

environment() {
  [ "${#variables[@]}" -eq 0 ] || echo "                env:"
  for variable in "${variables[@]}"; do
    echo "                - name: ${variable%%=*}"
    echo "                  value: $(literal "${variable#*=}")"
  done
}

manifest() {
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
$(optional '  namespace' "${NAMESPACE:-}")
${QUEUE:+  labels:}
$(optional '    kueue.x-k8s.io/queue-name' "${QUEUE:-}")
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  # A host that dies ends all; all begin again, from the newest checkpoint. A preemption with notice is no failure and is not
  # counted; hosts that vanish without one may end the others first (69), which is.
  failurePolicy:
    maxRestarts: ${RESTARTS:-100}
    rules:
    - name: preempted
      action: RestartJobSetAndIgnoreMaxRestarts
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: ${SLICES:-1}
      template:
        spec:
          parallelism: $HOSTS
          completions: $HOSTS
          completionMode: Indexed
          backoffLimit: 0
          podFailurePolicy:
            rules:
            # 75: saved because of SIGTERM (llama_jax/training/preemption.py).
            - action: FailJob
              onExitCodes:
                containerName: llama-jax
                operator: In
                values: [75]
            - action: FailJob
              onPodConditions:
              - type: DisruptionTarget
                status: "True"
          template:
            spec:
              restartPolicy: Never
              hostNetwork: true
              dnsPolicy: ClusterFirstWithHostNet
$(optional '              serviceAccountName' "${SERVICE_ACCOUNT:-}")
              # The time that a save gets between the preemption notice and the end.
              terminationGracePeriodSeconds: 300
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $TYPE
                cloud.google.com/gke-tpu-topology: $TOPOLOGY
$(optional '                cloud.google.com/gke-spot' "${SPOT:+true}")
              tolerations:
                - key: google.com/tpu
                  operator: Exists
                  effect: NoSchedule
              containers:
              - name: llama-jax
                image: $IMAGE
                command: [python]
                args:
$(arguments "$@")
$(environment)
                ports:
                - containerPort: 8471
                - containerPort: 8080
                resources:
                  limits:
                    google.com/tpu: ${CHIPS:-4}
YAML
  if [ -n "${CLAIM:-}" ]; then
    cat <<YAML
                volumeMounts:
                - name: shared
                  mountPath: /shared
              volumes:
              - name: shared
                persistentVolumeClaim:
                  claimName: $CLAIM
YAML
  fi
}

if [ "$mode" = apply ]; then
  command -v kubectl >/dev/null || fail "kubectl is not installed"
  manifest "$@" | kubectl apply -f -
else
  manifest "$@"
fi
