{{- define "deepseek.name" -}}
{{ printf "%s-%s" .root.Release.Name .part | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "deepseek.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .part }}
{{- end }}

{{- define "deepseek.labels" -}}
{{ include "deepseek.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{- define "deepseek.metadata" -}}
metadata:
  name: {{ include "deepseek.name" . }}
  namespace: {{ .root.Release.Namespace }}
  labels: {{- include "deepseek.labels" . | nindent 4 }}
{{- end }}

{{- define "deepseek.image" -}}
image: {{ printf "%s:%s" .image.repository (.image.tag | default .root.Chart.AppVersion) | quote }}
imagePullPolicy: {{ .image.pullPolicy }}
{{- end }}

{{- define "deepseek.podSecurity" -}}
automountServiceAccountToken: false
# A service named deepseek-gateway would give the gateway variables that look like its settings.
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 1000
  runAsGroup: 1000
  fsGroup: 1000
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "deepseek.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  runAsNonRoot: true
  capabilities: {drop: [ALL]}
{{- end }}

{{- define "deepseek.spread" -}}
topologySpreadConstraints:
  {{- range $key := list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - maxSkew: 1
    topologyKey: {{ $key }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "deepseek.selector" $ | nindent 8 }}
  {{- end }}
{{- end }}

{{- define "deepseek.tritonPod" -}}
{{- $triton := .root.Values.triton }}
{{- $repository := .root.Values.repository }}
{{- $sources := compact (list $repository.claim $repository.image $repository.job.image) }}
{{- if ne (len $sources) 1 }}
{{- fail "repository: give exactly one of claim, image and job.image" }}
{{- end }}
metadata:
  labels: {{- include "deepseek.labels" . | nindent 4 }}
  annotations:
    checksum/probe: {{ .root.Files.Get "files/engine_probe.py" | sha256sum }}
spec:
  {{- include "deepseek.podSecurity" . | nindent 2 }}
  {{- include "deepseek.spread" . | nindent 2 }}
  terminationGracePeriodSeconds: {{ add $triton.drainSeconds 30 }}
  {{- with $triton.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with $triton.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $triton.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if $repository.job.image }}
  initContainers:
    - name: models
      image: {{ $repository.job.image | quote }}
      imagePullPolicy: {{ $triton.image.pullPolicy }}
      command: {{- toYaml $repository.job.command | nindent 8 }}
      {{- include "deepseek.containerSecurity" . | nindent 6 }}
      resources:
        requests: {cpu: "1", memory: 2Gi}
        limits: {cpu: "4", memory: 8Gi}
      volumeMounts:
        - {name: models, mountPath: /models}
        - {name: tmp, mountPath: /tmp}
  {{- end }}
  containers:
    - name: triton
      {{- include "deepseek.image" (dict "root" .root "image" .image) | nindent 6 }}
      {{- with .command }}
      command: {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- include "deepseek.containerSecurity" . | nindent 6 }}
      env:
        - {name: HOME, value: /tmp}
        {{- with $triton.adminKeySecret }}
        - name: TRITON_ADMIN_KEY
          valueFrom: {secretKeyRef: {name: {{ . }}, key: admin-key}}
        {{- end }}
      ports:
        - {name: http, containerPort: 8000}
        - {name: grpc, containerPort: 8001}
        - {name: metrics, containerPort: 8002}
      resources:
        requests:
          {{- toYaml $triton.resources.requests | nindent 10 }}
          {{- if $triton.gpus }}
          nvidia.com/gpu: {{ $triton.gpus }}
          {{- end }}
        limits:
          {{- toYaml $triton.resources.limits | nindent 10 }}
          {{- if $triton.gpus }}
          nvidia.com/gpu: {{ $triton.gpus }}
          {{- end }}
      # An engine computes a first step before its model is ready: ready means warm.
      startupProbe:
        httpGet: {path: /v2/models/{{ .root.Values.model }}/ready, port: http}
        periodSeconds: 5
        timeoutSeconds: 4
        failureThreshold: {{ div $triton.startupSeconds 5 }}
      readinessProbe:
        httpGet: {path: /v2/models/{{ .root.Values.model }}/ready, port: http}
        periodSeconds: 5
        timeoutSeconds: 4
      livenessProbe:
        exec: {command: [python3, /probe/engine_probe.py, alive, /tmp/progress.json, {{ $triton.stallSeconds | quote }}]}
        periodSeconds: 15
        timeoutSeconds: 10
      lifecycle:
        preStop:
          exec: {command: [python3, /probe/engine_probe.py, drain, {{ $triton.drainSeconds | quote }}]}
      volumeMounts:
        - {name: models, mountPath: /models, readOnly: true}
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
        - {name: probe, mountPath: /probe, readOnly: true}
        {{- with .checkpoint }}
        - {name: checkpoint, mountPath: {{ .path }}, readOnly: true}
        {{- end }}
  volumes:
    - name: models
      {{- if $repository.claim }}
      persistentVolumeClaim: {claimName: {{ $repository.claim }}, readOnly: true}
      {{- else if $repository.image }}
      image: {reference: {{ $repository.image | quote }}, pullPolicy: IfNotPresent}
      {{- else }}
      emptyDir: {sizeLimit: {{ $repository.job.size }}}
      {{- end }}
    - {name: tmp, emptyDir: {sizeLimit: 10Gi}}
    - {name: shm, emptyDir: {medium: Memory, sizeLimit: {{ $triton.sharedMemory }}}}
    {{- with .checkpoint }}
    - {name: checkpoint, persistentVolumeClaim: {claimName: {{ .claim }}, readOnly: true}}
    {{- end }}
    - {name: probe, configMap: {name: {{ include "deepseek.name" (dict "root" .root "part" "probe") }}}}
{{- end }}
