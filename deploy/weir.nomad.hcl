# Weir on every client of a cluster, run by Nomad itself: a system job that
# installs the plugin on each node and runs the agent there.
#
#	nomad job run -var weir_dir=/opt/weir/v1.0.0 weir.nomad.hcl
#	nomad job run -var artifact=https://…/weir-v1.0.0-linux-amd64.tar.gz?checksum=sha256:… weir.nomad.hcl
#
# Clients need the raw_exec driver (plugin "raw_exec" { config { enabled = true } })
# and run as root. Nomad looks at plugins when its client starts: after the first
# run restart the clients, or from Nomad 1.11.2 on send them SIGHUP. What runs goes on.
#
# To upgrade, run the job again with the new version: nodes are updated one after
# the other, programs are swapped with every connection kept. Stopping the job
# stops the agents and changes nothing for any allocation; `weir uninstall` on the
# node, once it is drained, takes Weir off it.

variable "weir_dir" {
  description = "Directory on every node that has weir and weir-cni; not used with artifact."
  type        = string
  default     = "/opt/weir"
}

variable "artifact" {
  description = "URL of the tarball that `make package` makes, with ?checksum=sha256:…; empty: weir_dir has the programs."
  type        = string
  default     = ""
}

variable "replace" {
  description = "Keep a consul-cni that is not Weir's aside and take its place. Without it such a node's task fails and says so."
  type        = bool
  default     = false
}

variable "cni_path" {
  description = "The clients' cni_path: one directory of it."
  type        = string
  default     = "/opt/cni/bin"
}

variable "cni_config_dir" {
  description = "The clients' cni_config_dir."
  type        = string
  default     = "/opt/cni/config"
}

variable "bin_dir" {
  description = "Where the weir command goes, for operators on the node. The agent runs from there."
  type        = string
  default     = "/usr/local/bin"
}

variable "config_dir" {
  description = "The agent's configuration; a file that is there is never changed."
  type        = string
  default     = "/etc/weir.d"
}

variable "manifest_dir" {
  description = "Where the node remembers what was installed."
  type        = string
  default     = "/var/lib/weir"
}

variable "agent_args" {
  description = "More arguments of `weir agent`, such as [\"-guard\", \"enforce\"]."
  type        = list(string)
  default     = []
}

variable "agent_env" {
  description = "The agent's environment: CONSUL_HTTP_ADDR, CONSUL_HTTP_TOKEN_FILE, WEIR_…"
  type        = map(string)
  default     = {}
}

variable "datacenters" {
  type    = list(string)
  default = ["*"]
}

variable "node_pool" {
  type    = string
  default = "all"
}

variable "namespace" {
  type    = string
  default = "default"
}

job "weir" {
  type        = "system"
  namespace   = var.namespace
  datacenters = var.datacenters
  node_pool   = var.node_pool
  priority    = 90

  # 6.1 or newer. A pattern, because distributions' versions are not semantic ones.
  constraint {
    attribute = "${attr.kernel.version}"
    operator  = "regexp"
    value     = "^(6[.]([1-9]|[1-9][0-9]+)|[7-9]|[1-9][0-9]+)[.]"
  }

  constraint {
    attribute = "${attr.kernel.name}"
    value     = "linux"
  }

  update {
    max_parallel = 1
    stagger      = "10s"
  }

  group "node" {
    # The agent may be away for as long as it takes: nothing depends on it.
    restart {
      attempts = 10
      interval = "5m"
      delay    = "5s"
      mode     = "delay"
    }

    task "install" {
      driver = "raw_exec"

      lifecycle {
        hook    = "prestart"
        sidecar = false
      }

      dynamic "artifact" {
        for_each = var.artifact == "" ? [] : [var.artifact]
        content {
          source      = artifact.value
          destination = "local"
        }
      }

      config {
        command = var.artifact == "" ? "${var.weir_dir}/weir" : "${NOMAD_TASK_DIR}/weir/weir"
        args = concat(
          [
            "install",
            "-cni-path", var.cni_path,
            "-cni-config-dir", var.cni_config_dir,
            "-bin-dir", var.bin_dir,
            "-config-dir", var.config_dir,
            "-manifest-dir", var.manifest_dir,
            "-unit-dir", "", # this job is in the unit's place
          ],
          var.replace ? ["-replace"] : [],
        )
      }

      resources {
        cpu    = 100
        memory = 128 # the agent has as much
      }
    }

    task "agent" {
      driver = "raw_exec"

      env = var.agent_env

      config {
        command = "${var.bin_dir}/weir"
        args    = concat(["agent", "-config", var.config_dir], var.agent_args)
      }

      kill_signal  = "SIGTERM"
      kill_timeout = "15s"

      logs {
        max_files     = 3
        max_file_size = 5
      }

      resources {
        cpu    = 100
        memory = 128
      }
    }
  }
}
