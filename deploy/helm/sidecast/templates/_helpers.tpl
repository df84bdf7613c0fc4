{{- define "sidecast.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "sidecast.selector" -}}
app.kubernetes.io/name: sidecast
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "sidecast.labels" -}}
{{ include "sidecast.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "sidecast.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{- define "sidecast.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "sidecast.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "sidecast.args" -}}
- serve
- --host=0.0.0.0
- --port={{ .Values.ports.grpc }}
- --metrics-port={{ .Values.ports.metrics }}
- --tls-cert=/etc/sidecast/service/tls.crt
- --tls-key=/etc/sidecast/service/tls.key
{{- if .Values.secrets.tenants }}
- --tenants-file=/etc/sidecast/tenants/tenants
{{- else }}
- --token-file=/etc/sidecast/client/token
{{- end }}
{{- if .Values.secrets.clientCa }}
- --tls-client-ca=/etc/sidecast/client-ca/ca.crt
{{- end }}
- --history-dir=/var/lib/sidecast/service
- --history-gib={{ .Values.service.historyGib }}
{{- with .Values.service.historyGibPerRun }}
- --history-gib-per-run={{ . }}
{{- end }}
- --max-sessions={{ .Values.service.maxSessions }}
- --engines={{ .Values.service.engines }}
- --engine-threads={{ .Values.service.engineThreads }}
{{- with .Values.service.device }}
- --device={{ . }}
{{- end }}
{{- range .Values.service.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end -}}

{{- /* Kubernetes' own gRPC probes know no TLS. */ -}}
{{- define "sidecast.probe" -}}
exec:
  command:
    - python
    - /etc/sidecast/probe/probe.py
    - {{ printf "127.0.0.1:%v" .Values.ports.grpc | quote }}
    - {{ printf "%s.%s.svc" (include "sidecast.fullname" .) .Release.Namespace }}
    - /etc/sidecast/client/ca.crt
    {{- if .Values.secrets.probe }}
    - /etc/sidecast/probe-tls/tls.crt
    - /etc/sidecast/probe-tls/tls.key
    {{- end }}
periodSeconds: 10
timeoutSeconds: 5
{{- end -}}

{{- define "sidecast.probes" -}}
startupProbe:
  {{- include "sidecast.probe" . | nindent 2 }}
  failureThreshold: {{ .Values.probe.startupFailureThreshold }}
readinessProbe:
  {{- include "sidecast.probe" . | nindent 2 }}
livenessProbe:
  {{- include "sidecast.probe" . | nindent 2 }}
  failureThreshold: 6
{{- end -}}

{{- define "sidecast.mounts" -}}
- {name: service-tls, mountPath: /etc/sidecast/service, readOnly: true}
- {name: client, mountPath: /etc/sidecast/client, readOnly: true}
{{- if .Values.secrets.tenants }}
- {name: tenants, mountPath: /etc/sidecast/tenants, readOnly: true}
{{- end }}
{{- if .Values.secrets.clientCa }}
- {name: client-ca, mountPath: /etc/sidecast/client-ca, readOnly: true}
- {name: probe-tls, mountPath: /etc/sidecast/probe-tls, readOnly: true}
{{- end }}
- {name: probe, mountPath: /etc/sidecast/probe, readOnly: true}
- {name: history, mountPath: /var/lib/sidecast}
- {name: shm, mountPath: /dev/shm}
- {name: tmp, mountPath: /tmp}
- {name: home, mountPath: /home/sidecast}
{{- end -}}

{{- define "sidecast.volumes" -}}
- name: service-tls
  secret: {secretName: {{ .Values.secrets.service }}, defaultMode: 0440}
- name: client
  secret: {secretName: {{ .Values.secrets.client }}, defaultMode: 0440}
{{- with .Values.secrets.tenants }}
- name: tenants
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- if .Values.secrets.clientCa }}
- name: client-ca
  secret: {secretName: {{ .Values.secrets.clientCa }}, defaultMode: 0440}
- name: probe-tls
  secret: {secretName: {{ required "secrets.probe is empty; with secrets.clientCa the probes need a certificate" .Values.secrets.probe }}, defaultMode: 0440}
{{- end }}
- name: probe
  configMap: {name: {{ include "sidecast.fullname" . }}-probe}
{{- if ne .Values.kind "statefulset" }}
- name: history
  emptyDir: {sizeLimit: {{ .Values.history.size }}}
{{- end }}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ .Values.sharedMemory }}}
- name: tmp
  emptyDir: {}
- name: home
  emptyDir: {}
{{- end -}}

{{- define "sidecast.placement" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}
